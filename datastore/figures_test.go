package datastore

import (
	"bufio"
	"crypto/x509"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// Flags of TestStoreFigures. With -short each figure takes a fifth of the time.
var (
	figuresEach = flag.Duration("figures.each", 2*time.Second, "TestStoreFigures: how long each figure is measured")
	figuresFile = flag.String("figures.json", "", "TestStoreFigures: write all figures as JSON to this file, an absolute path")
)

// figuresClients are the numbers of clients of TestStoreFigures.
var figuresClients = []int{1, 32, 1000}

const (
	lowRate      = 2           // writes per second of an idle cluster
	lowRateFor   = time.Minute // covers two commits of the database
	watchClients = 100         // resource types, each with a client and a watch
)

// figuresWay is one way to the store: function calls in one process, or two processes with gRPC between them.
type figuresWay struct {
	name      string
	processes []*figuresConn // the last one has the clients
}

// figure is one line of the table.
type figure struct {
	Operation, Way string
	Clients        int
	P50, P99       time.Duration
	PerSecond      float64
	CPU            time.Duration // of all processes, per request
	Bytes, Flushes float64       // written by all processes, per request
}

// footing is the memory of the processes of one way.
type footing struct {
	Way, When                           string
	Anonymous, Proportional, PeakOfEach int64
}

// TestStoreFigures measures one store as the API server of kedge reaches it, and the same store, with the same settings,
// as a process of its own behind gRPC: make bench-store. docs/performance.md has the figures. It asserts nothing.
//
// All ways exist from the beginning, and each figure is measured of all of them before the next one, so that a busy
// minute of the machine affects all. Every client has a connection of its own.
func TestStoreFigures(t *testing.T) {
	if os.Getenv("KEDGE_BENCH") == "" {
		t.Skip("measures; run it with make bench-store")
	}
	each, low := *figuresEach, lowRateFor
	if testing.Short() {
		each, low = each/5, low/10
	}
	t.Log(machineOfFigures())
	ways := startWays(t)
	var figures []figure
	var memory []footing
	bare := bareWrites(t, each)
	for _, w := range ways {
		w.command(t, figuresCommand{Do: "connect", Clients: 1})
		w.command(t, figuresCommand{Do: "load", Op: "fill", Clients: 1})
		memory = append(memory, w.footing(t, fmt.Sprintf("%d objects, 1 client", listed)))
	}
	for _, clients := range figuresClients {
		for _, w := range ways {
			w.command(t, figuresCommand{Do: "connect", Clients: clients})
		}
		for _, op := range []string{"update", "create", "get", "list"} {
			for _, w := range ways {
				figures = append(figures, w.measure(t, figuresCommand{Do: "load", Op: op, Clients: clients, For: each}))
			}
			for _, w := range ways {
				if op == "get" || op == "list" {
					memory = append(memory, w.footing(t, fmt.Sprintf("%d clients, after each %s", clients, op)))
				}
			}
		}
	}
	bare = append(bare, bareWrites(t, each)...)
	slices.Sort(bare)
	for _, w := range []*figuresWay{ways[0], ways[len(ways)-1]} { // the others take as long, and are between them
		w.command(t, figuresCommand{Do: "close"})
		w.command(t, figuresCommand{Do: "connect", Clients: 1})
		figures = append(figures, w.measure(t, figuresCommand{Do: "load", Op: "update", Clients: 1, For: low, Rate: lowRate}))
		figures[len(figures)-1].Operation = fmt.Sprintf("update, %d a second", lowRate)
	}
	memory = append(memory, watchMemory(t)...)
	report(t, bare, figures, memory)
}

// watchMemory measures new stores with one client, and then with one client and one watch for each resource type.
func watchMemory(t *testing.T) (out []footing) {
	for _, w := range startWays(t) {
		w.command(t, figuresCommand{Do: "connect", Clients: 1})
		w.command(t, figuresCommand{Do: "watch", Clients: 1})
		out = append(out, w.footing(t, "new, 1 client and watch"))
		w.command(t, figuresCommand{Do: "connect", Clients: watchClients})
		w.command(t, figuresCommand{Do: "watch", Clients: watchClients})
		out = append(out, w.footing(t, fmt.Sprintf("new, %d clients and watches", watchClients)))
	}
	return out
}

func machineOfFigures() string {
	load, _ := os.ReadFile("/proc/loadavg")
	return fmt.Sprintf("%d cores, %s, load %s", runtime.NumCPU(), runtime.GOARCH, strings.TrimSpace(string(load)))
}

// startWays starts the processes of all ways.
func startWays(t *testing.T) []*figuresWay {
	t.Helper()
	both := func(name string, role figuresRole) *figuresWay {
		dir := t.TempDir()
		server, load := role, role
		server.Store, load.Load = true, true
		return &figuresWay{name, []*figuresConn{startFigures(t, filepath.Join(dir, "server"), server), startFigures(t, filepath.Join(dir, "load"), load)}}
	}
	certificate, key := selfSigned(t)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	socketDir, err := os.MkdirTemp("/tmp", "kedge-store-") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(socketDir) })
	socket := filepath.Join(socketDir, "s")
	plain, encrypted := freeAddress(t), freeAddress(t)
	return []*figuresWay{
		{"in process", []*figuresConn{startFigures(t, t.TempDir(), figuresRole{Store: true, Load: true})}},
		both("unix socket", figuresRole{Network: "unix", Address: socket, Endpoint: "unix://" + socket}),
		both("TCP", figuresRole{Network: "tcp", Address: plain, Endpoint: "http://" + plain}),
		both("mutual TLS", figuresRole{Network: "tcp", Address: encrypted, Endpoint: "https://" + encrypted, Certificate: certificate, Key: der}),
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// figuresConn is a process of TestStoreFigures.
type figuresConn struct {
	command *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Scanner
}

func startFigures(t *testing.T, dir string, role figuresRole) *figuresConn {
	t.Helper()
	data, err := json.Marshal(role)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, figuresConfig), data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	p := &figuresConn{command: exec.Command(os.Args[0])}
	p.command.Env = append(os.Environ(), childRole+"="+roleFigures, childDir+"="+dir)
	p.command.Stderr = os.Stderr
	stdout, err := p.command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if p.in, err = p.command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewScanner(stdout)
	if err := p.command.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.in.Close() // it ends by itself
		kill := time.AfterFunc(time.Minute, func() { _ = p.command.Process.Kill() })
		defer kill.Stop()
		if err := p.command.Wait(); err != nil {
			t.Errorf("a process of the benchmark: %v", err)
		}
	})
	p.read(t)
	return p
}

func (p *figuresConn) read(t *testing.T) (a figuresAnswer) {
	t.Helper()
	if !p.out.Scan() {
		t.Fatalf("a process of the benchmark has ended: %v", p.out.Err())
	}
	if err := json.Unmarshal(p.out.Bytes(), &a); err != nil || a.Error != "" {
		t.Fatalf("%v%s", err, a.Error)
	}
	return a
}

func (p *figuresConn) ask(t *testing.T, c figuresCommand) figuresAnswer {
	t.Helper()
	data, err := json.Marshal(c)
	if err == nil {
		_, err = p.in.Write(append(data, '\n'))
	}
	if err != nil {
		t.Fatal(err)
	}
	return p.read(t)
}

// command makes the process with the clients do something.
func (w *figuresWay) command(t *testing.T, c figuresCommand) figuresAnswer {
	t.Helper()
	return w.processes[len(w.processes)-1].ask(t, c)
}

// usage is the sum over all processes.
func (w *figuresWay) usage(t *testing.T) (sum figuresAnswer) {
	t.Helper()
	for _, p := range w.processes {
		a := p.ask(t, figuresCommand{Do: "usage"})
		sum.CPU += a.CPU
		sum.Written += a.Written
		sum.Syncs += a.Syncs
		sum.Commits += a.Commits
		sum.Anonymous += a.Anonymous
		sum.Proportional += a.Proportional
		sum.Peaked += a.Peaked
	}
	return sum
}

func (w *figuresWay) footing(t *testing.T, when string) footing {
	t.Helper()
	for _, p := range w.processes {
		p.ask(t, figuresCommand{Do: "collect"})
	}
	u := w.usage(t)
	return footing{w.name, when, u.Anonymous, u.Proportional, u.Peaked}
}

func (w *figuresWay) measure(t *testing.T, c figuresCommand) figure {
	t.Helper()
	before := w.usage(t)
	a := w.command(t, c)
	after := w.usage(t)
	n := float64(a.Count)
	return figure{
		Operation: c.Op, Way: w.name, Clients: c.Clients, P50: a.P50, P99: a.P99, PerSecond: n / a.Took.Seconds(),
		CPU:   (after.CPU - before.CPU) / time.Duration(a.Count),
		Bytes: float64(after.Written-before.Written) / n,
		// A commit of the database flushes its pages, and then its first page.
		Flushes: (float64(after.Syncs-before.Syncs) + 2*float64(after.Commits-before.Commits)) / n,
	}
}

// bareWrites measures writes of 1 KiB to a file that exists, each of them flushed: the least that a durable write needs.
func bareWrites(t *testing.T, d time.Duration) (took []time.Duration) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "bare"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, walSegment)); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	data := objectOf1KiB()
	for began, at := time.Now(), int64(0); time.Since(began) < d; at = (at + 1024) % walSegment {
		begin := time.Now()
		if _, err := f.WriteAt(data, at); err != nil {
			t.Fatal(err)
		}
		if err := unix.Fdatasync(int(f.Fd())); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(begin))
	}
	return took
}

// report prints the figures, and writes them to a file if wanted.
func report(t *testing.T, bare []time.Duration, figures []figure, memory []footing) {
	t.Helper()
	var out strings.Builder
	w := tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "operation\tclients\tway\tp50\tp99\ta second\tCPU s per 1000\tbytes\tflushes\t")
	for _, f := range figures {
		fmt.Fprintf(w, "%s\t%d\t%s\t%s\t%s\t%.0f\t%.3f\t%.0f\t%.2f\t\n", f.Operation, f.Clients, f.Way, brief(f.P50), brief(f.P99), f.PerSecond, f.CPU.Seconds()*1000, f.Bytes, f.Flushes)
	}
	fmt.Fprintf(w, "1 KiB written and flushed\t1\tno store\t%s\t%s\t\t\t\t1\t\n", brief(percentile(bare, 50)), brief(percentile(bare, 99)))
	_ = w.Flush()
	out.WriteByte('\n')
	w = tabwriter.NewWriter(&out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "memory, MB\tway\tanonymous\tproportional\tpeak resident\t")
	for _, m := range memory {
		fmt.Fprintf(w, "%s\t%s\t%.1f\t%.1f\t%.1f\t\n", m.When, m.Way, float64(m.Anonymous)/1e6, float64(m.Proportional)/1e6, float64(m.PeakOfEach)/1e6)
	}
	_ = w.Flush()
	t.Logf("%s\n%s", machineOfFigures(), &out)
	if *figuresFile == "" {
		return
	}
	data, err := json.MarshalIndent(map[string]any{"Bare": map[string]time.Duration{"P50": percentile(bare, 50), "P99": percentile(bare, 99)}, "Figures": figures, "Memory": memory}, "", "  ")
	if err == nil {
		err = os.WriteFile(*figuresFile, append(data, '\n'), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func brief(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return d.Round(time.Microsecond).String()
	case d < 100*time.Millisecond:
		return d.Round(10 * time.Microsecond).String()
	}
	return d.Round(time.Millisecond).String()
}

func TestPercentile(t *testing.T) {
	var hundred []time.Duration
	for i := range 100 {
		hundred = append(hundred, time.Duration(i+1))
	}
	for _, tc := range []struct {
		sorted []time.Duration
		p      int
		want   time.Duration
	}{
		{nil, 50, 0}, {hundred[:1], 50, 1}, {hundred[:1], 99, 1}, {hundred[:2], 50, 1}, {hundred[:3], 50, 2},
		{hundred, 50, 50}, {hundred, 99, 99}, {hundred[:99], 99, 99}, {hundred, 100, 100}, {hundred, 0, 1},
	} {
		if got := percentile(tc.sorted, tc.p); got != tc.want {
			t.Errorf("percentile %d of %d values is %d, want %d", tc.p, len(tc.sorted), got, tc.want)
		}
	}
}

// What is written is an object.
func TestObjectOf1KiB(t *testing.T) {
	for range 100 {
		var o corev1.ConfigMap
		if data := objectOf1KiB(); len(data) != 1024 || o.Unmarshal(data) != nil || o.Data["settings"] == "" {
			t.Fatalf("%d bytes: %v", len(data), &o)
		}
	}
}
