package datastore

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A process of TestStoreFigures is this test binary. It has the store, or the clients, or both. It reads commands from
// stdin as lines of JSON, and answers each with a line of JSON.

const figuresConfig = "figures.json"

// figuresRole is what such a process does.
type figuresRole struct {
	Store bool // it has the store, in its directory
	Load  bool // it has the clients
	// Network, Address and Endpoint are where the store listens, and how clients dial it. Empty if it does not listen: both
	// are in one process, as in kedge.
	Network, Address, Endpoint string
	Certificate, Key           []byte // DER, for mutual TLS; empty without
}

// figuresCommand is one of usage, collect, connect, load, watch and close.
type figuresCommand struct {
	Do      string
	Op      string // of load: update, create, get or list
	Clients int
	For     time.Duration
	Rate    float64 // writes per second of each client; 0: as many as possible
}

// figuresAnswer is the answer to any command.
type figuresAnswer struct {
	Error string

	// Of usage.
	CPU                                       time.Duration // user and system
	Written                                   int64         // bytes that went to the disk
	Syncs, Commits                            uint64        // of the log; of the database file
	Resident, Anonymous, Proportional, Peaked int64         // bytes

	// Of load.
	Count    int
	P50, P99 time.Duration
	Took     time.Duration
}

// figuresProcess is the state of such a process.
type figuresProcess struct {
	role    figuresRole
	store   *Store
	clients []*figuresClient
}

func runFigures() int {
	data, err := os.ReadFile(filepath.Join(os.Getenv(childDir), figuresConfig))
	p := &figuresProcess{}
	if err == nil {
		err = json.Unmarshal(data, &p.role)
	}
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if !p.role.Store {
		p.answer()
		return 0
	}
	p.store = New(testConfig(filepath.Join(os.Getenv(childDir), "store")), slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError})))
	err = p.store.Run(ctx, func() {
		if err := p.listen(); err != nil {
			panic(err)
		}
		go func() {
			defer cancel()
			p.answer()
		}()
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "Run:", err)
		return childFailed
	}
	return 0
}

// listen serves the store by gRPC, as etcd does. The process ends with it.
func (p *figuresProcess) listen() error {
	if p.role.Network == "" {
		return nil
	}
	listener, err := net.Listen(p.role.Network, p.role.Address)
	if err != nil {
		return err
	}
	tlsConfig, err := p.tls()
	if err != nil {
		return err
	}
	space := p.store.transport.Load().maintenance.(defragmenter)
	go func() { _ = v3rpc.Server(space.server, tlsConfig, nil).Serve(listener) }()
	return nil
}

func (p *figuresProcess) tls() (*tls.Config, error) {
	if len(p.role.Key) == 0 {
		return nil, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(p.role.Key)
	if err != nil {
		return nil, err
	}
	return mutualTLS(p.role.Certificate, key)
}

// answer answers commands until stdin ends.
func (p *figuresProcess) answer() {
	out := json.NewEncoder(os.Stdout)
	_ = out.Encode(figuresAnswer{}) // ready
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var c figuresCommand
		var a figuresAnswer
		err := json.Unmarshal(lines.Bytes(), &c)
		if err == nil {
			a, err = p.do(c)
		}
		if err != nil {
			a.Error = err.Error()
		}
		_ = out.Encode(a)
	}
}

func (p *figuresProcess) do(c figuresCommand) (figuresAnswer, error) {
	switch c.Do {
	case "usage":
		return usedSoFar()
	case "collect":
		runtime.GC() // what is left is needed
		return figuresAnswer{}, nil
	case "connect":
		return figuresAnswer{}, p.connect(c.Clients)
	case "load":
		return p.load(c)
	case "watch":
		for _, client := range p.clients[:c.Clients] {
			<-client.Watch(clientv3.WithRequireLeader(context.Background()), client.key, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
		}
		return figuresAnswer{}, nil
	case "close":
		for _, client := range p.clients {
			_ = client.Close() // one in process returns an error; see NewClient
		}
		p.clients = nil
		return figuresAnswer{}, nil
	}
	return figuresAnswer{}, fmt.Errorf("unknown command %q", c.Do)
}

// usedSoFar returns what the process has used so far.
func usedSoFar() (a figuresAnswer, err error) {
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		return a, err
	}
	a.CPU = time.Duration(r.Utime.Nano() + r.Stime.Nano())
	for _, field := range []struct {
		file, name string
		to         *int64
	}{
		{"io", "write_bytes", &a.Written},
		{"status", "VmRSS", &a.Resident},
		{"status", "RssAnon", &a.Anonymous},
		{"status", "VmHWM", &a.Peaked},
		{"smaps_rollup", "Pss", &a.Proportional},
	} {
		if *field.to, err = procField("/proc/self/"+field.file, field.name); err != nil {
			return a, err
		}
	}
	families, err := prometheus.DefaultGatherer.Gather()
	a.Syncs = observations(families, "etcd_disk_wal_fsync_duration_seconds")
	a.Commits = observations(families, "etcd_disk_backend_commit_duration_seconds")
	return a, err
}

func observations(families []*dto.MetricFamily, name string) (n uint64) {
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				n += m.GetHistogram().GetSampleCount()
			}
		}
	}
	return n
}

// procField reads a number of a file whose lines are "name: number", or "name: number kB".
func procField(file, name string) (int64, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if words := strings.Fields(line); len(words) >= 2 && words[0] == name+":" {
			n, err := strconv.ParseInt(words[1], 10, 64)
			if len(words) == 3 {
				n <<= 10
			}
			return n, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", file, name)
}

// figuresClient is a client with an object of its own.
type figuresClient struct {
	*kubernetes.Client

	key      string
	value    []byte
	revision int64 // of its object
	created  int   // how many objects it has created
}

// connect makes as many clients as are wanted, each with a connection of its own.
func (p *figuresProcess) connect(n int) error {
	from := len(p.clients)
	p.clients = append(p.clients, make([]*figuresClient, max(n-from, 0))...)
	errs := make([]error, len(p.clients))
	places := make(chan struct{}, 32)
	var wg sync.WaitGroup
	for i := from; i < len(p.clients); i++ {
		places <- struct{}{}
		wg.Go(func() {
			defer func() { <-places }()
			p.clients[i], errs[i] = p.newClient(fmt.Sprintf("/registry/configmaps/own-%04d/", i))
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// newClient returns a client whose object exists.
func (p *figuresProcess) newClient(key string) (*figuresClient, error) {
	c, err := p.dial()
	if err != nil {
		return nil, err
	}
	client := &figuresClient{Client: c, key: key, value: objectOf1KiB()}
	got, err := c.Kubernetes.Get(context.Background(), client.key, kubernetes.GetOptions{})
	if err != nil {
		return nil, err
	}
	if got.KV == nil {
		return client, client.do("update")
	}
	client.revision = got.KV.ModRevision
	return client, nil
}

func (p *figuresProcess) dial() (*kubernetes.Client, error) {
	if p.role.Endpoint == "" {
		return p.store.NewClient()
	}
	tlsConfig, err := p.tls()
	if err != nil {
		return nil, err
	}
	return kubernetes.New(clientv3.Config{Endpoints: []string{p.role.Endpoint}, TLS: tlsConfig})
}

const (
	listPrefix = "/registry/pods/listed/"
	listed     = 500 // objects
)

// do makes one request, as the API server does.
func (c *figuresClient) do(op string) error {
	ctx := context.Background()
	switch op {
	case "update":
		r, err := c.OptimisticPut(ctx, c.key, c.value, c.revision, kubernetes.PutOptions{GetOnFailure: true})
		if err == nil && !r.Succeeded {
			err = errors.New("another client has changed the object")
		}
		c.revision = r.Revision
		return err
	case "create":
		c.created++
		r, err := c.OptimisticPut(ctx, fmt.Sprintf("%s%d-%d", c.key, time.Now().UnixNano(), c.created), c.value, 0, kubernetes.PutOptions{})
		if err == nil && !r.Succeeded {
			err = errors.New("the object exists")
		}
		return err
	case "get":
		r, err := c.Kubernetes.Get(ctx, c.key, kubernetes.GetOptions{})
		if err == nil && r.KV == nil {
			err = errors.New("the object is gone")
		}
		return err
	case "list":
		r, err := c.List(ctx, listPrefix, kubernetes.ListOptions{Limit: listed})
		if err == nil && len(r.Kvs) != listed {
			err = fmt.Errorf("%d objects", len(r.Kvs))
		}
		return err
	case "fill":
		for i := range listed {
			if _, err := c.Put(ctx, fmt.Sprintf("%s%05d", listPrefix, i), string(c.value)); err != nil {
				return err
			}
		}
		return nil
	}
	return fmt.Errorf("unknown operation %q", op)
}

// load makes requests with the first clients, and measures each.
func (p *figuresProcess) load(c figuresCommand) (figuresAnswer, error) {
	took := make([][]time.Duration, c.Clients)
	errs := make([]error, c.Clients)
	var wg sync.WaitGroup
	began := time.Now()
	for i, client := range p.clients[:c.Clients] {
		wg.Go(func() {
			for n := 0; n == 0 || time.Since(began) < c.For; n++ {
				if c.Rate > 0 {
					time.Sleep(time.Until(began.Add(time.Duration(float64(n) / c.Rate * float64(time.Second)))))
				}
				begin := time.Now()
				if errs[i] = client.do(c.Op); errs[i] != nil {
					return
				}
				took[i] = append(took[i], time.Since(begin))
			}
		})
	}
	wg.Wait()
	a := figuresAnswer{Took: time.Since(began)}
	all := slices.Concat(took...)
	slices.Sort(all)
	a.Count, a.P50, a.P99 = len(all), percentile(all, 50), percentile(all, 99)
	return a, errors.Join(errs...)
}

// percentile returns the smallest value that p of a hundred values are not above. The values are sorted.
func percentile(sorted []time.Duration, p int) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[max((len(sorted)*p+99)/100, 1)-1]
}

// objectOf1KiB returns an object as the API server stores it, of exactly 1 KiB: names, labels and owners that compress
// about as well as real ones.
func objectOf1KiB() []byte {
	const size = 1024
	uid := func() types.UID {
		return types.UID(fmt.Sprintf("%08x-%04x-4%03x-8%03x-%012x", rand.Uint32(), rand.N(1<<16), rand.N(1<<12), rand.N(1<<12), rand.N(int64(1)<<48)))
	}
	o := corev1.ConfigMap{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMap"},
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("settings-%x", rand.Uint32()), Namespace: "default", UID: uid(), CreationTimestamp: metav1.Now(),
			Labels:          map[string]string{"app.kubernetes.io/name": "shop", "app.kubernetes.io/component": "basket", "pod-template-hash": fmt.Sprintf("%x", rand.Uint32())},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "basket", UID: uid()}},
			ManagedFields: []metav1.ManagedFieldsEntry{{
				Manager: "kubectl", Operation: metav1.ManagedFieldsOperationUpdate, APIVersion: "v1", FieldsType: "FieldsV1",
				FieldsV1: &metav1.FieldsV1{Raw: []byte(`{"f:data":{".":{},"f:settings":{}},"f:metadata":{"f:labels":{".":{},"f:app.kubernetes.io/name":{}}}}`)},
			}},
		},
		Data: map[string]string{"settings": ""},
	}
	for {
		data, err := o.Marshal()
		if err != nil {
			panic(err)
		}
		switch missing := size - len(data); {
		case missing == 0:
			return data
		case missing < 20:
			o.Data["settings"] += strings.Repeat("#", missing)
		default:
			o.Data["settings"] += fmt.Sprintf("key%d=%x\n", rand.N(1000), rand.Uint32())
		}
	}
}
