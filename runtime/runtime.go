package runtime

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	goruntime "runtime"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/cmd/containerd/server"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"kedge/internal/mounts"
)

// Keys of log attributes.
const (
	keyError   = "error"
	keyPath    = "path"
	keyImage   = "image"
	keyElapsed = "elapsed"
)

// errGaveUp is what Run returns when a part of containerd would have ended the process.
var errGaveUp = errors.New("containerd gave up; its last messages say why")

// Runtime is containerd in this process, as a component.
type Runtime struct {
	cfg Config
	log *slog.Logger
}

// New returns a Runtime for a configuration that Validate accepts.
func New(cfg Config, log *slog.Logger) *Runtime {
	return &Runtime{cfg: cfg, log: log.With("component", "containerd")}
}

// Name implements lifecycle.Component.
func (r *Runtime) Name() string { return "containerd" }

// Socket is where containerd answers once Run has called ready.
func (r *Runtime) Socket() string { return r.cfg.Socket() }

// Run starts containerd, adopts the pods of an earlier process, and serves until
// ctx is cancelled. Pods go on running after that. It calls ready when a pod can
// be created, network apart.
//
// containerd's parts are registered once per process with pointers to their
// configuration, so that one process can hold one Runtime at a time.
func (r *Runtime) Run(ctx context.Context, ready func()) error {
	if err := r.cfg.Validate(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("containers need root; run kedge as root")
	}
	unlock, err := lockNode(r.cfg)
	if err != nil {
		return err
	}
	defer unlock()

	begun := time.Now()
	p, err := embeddedPayload()
	if err != nil {
		return err
	}
	bin, err := p.unpack(r.cfg.payloadRoot())
	if err != nil {
		return fmt.Errorf("unpack shim and runc: %w", err)
	}
	var program bytes.Buffer
	if err := p.program(&program, programPause); err != nil {
		return err
	}
	pause, err := newPauseImage(program.Bytes())
	if err != nil {
		return err
	}
	if err := clearLeftovers(r.cfg); err != nil {
		return err
	}
	if err := repairDatabases(ctx, r.cfg, r.log); err != nil {
		return err
	}
	registries, err := LoadRegistries(r.cfg.RegistriesFile)
	if err != nil {
		return err
	}
	rewriter, err := r.applyRegistries(registries)
	if err != nil {
		return err
	}
	defer rewriter.close()

	snapshotter, err := chooseSnapshotter(r.cfg)
	if err != nil {
		return fmt.Errorf("choose snapshotter: %w", err)
	}
	cgroup := r.cfg.CgroupDriver
	if cgroup == "" {
		cgroup = DetectCgroupDriver()
	}
	config := containerdConfig(r.cfg, settings{
		host:        detectHost(),
		snapshotter: snapshotter,
		cgroup:      cgroup,
		shim:        filepath.Join(bin, programShim),
		runc:        filepath.Join(bin, programRunc),
		pauseImage:  pause.name,
		auths:       registries.auths(),
	})

	// A library that is told to exit must not take the API server with it.
	gaveUp := make(chan struct{}, 1)
	logrus.StandardLogger().ExitFunc = func(int) {
		select {
		case gaveUp <- struct{}{}:
		default:
		}
		goruntime.Goexit()
	}
	setEnvironment(bin)

	// Plugins keep this context for as long as they live; Stop ends them, in order.
	served := context.WithoutCancel(ctx)
	if err := server.CreateTopLevelDirectories(config); err != nil {
		return fmt.Errorf("containerd's directories: %w", err)
	}
	keepKlogFlags := saveKlogFlags()
	srv, err := server.New(served, config)
	keepKlogFlags()
	if err != nil {
		return fmt.Errorf("compose containerd: %w", err)
	}
	defer r.stop(srv)
	if err := moveCNICache(srv, r.cfg.cniCache()); err != nil {
		return fmt.Errorf("keep the CNI cache in the run directory: %w", err)
	}
	if err := srv.Start(served); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	if err := r.untilReady(ctx, srv, gaveUp, pause, snapshotter); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	if err := prunePayloads(r.cfg.payloadRoot(), bin, r.cfg.state()); err != nil {
		r.log.Warn("programs of earlier versions could not be removed", keyError, err)
	}
	r.log.Info("containerd is ready", "node", r.cfg.NodeName, keyElapsed, time.Since(begun).Round(time.Millisecond),
		"socket", r.Socket(), "snapshotter", snapshotter, "cgroup_driver", cgroup)
	ready()

	select {
	case <-ctx.Done():
		return nil
	case <-gaveUp:
		return errGaveUp
	}
}

// untilReady waits for the CRI's recovery of running pods and gives it the pause
// image, without which it would try to pull one.
func (r *Runtime) untilReady(ctx context.Context, srv *server.Server, gaveUp <-chan struct{}, pause *pauseImage, snapshotter string) error {
	recovered := make(chan struct{})
	go func() {
		srv.Wait()
		close(recovered)
	}()
	select {
	case <-recovered:
	case <-gaveUp:
		return errGaveUp
	case <-ctx.Done():
		return ctx.Err()
	}

	return withClient(r.Socket(), func(client *containerd.Client) error {
		ctx := namespaces.WithNamespace(ctx, criNamespace)
		if err := pause.ensure(ctx, client, snapshotter); err != nil {
			return err
		}
		return untilCRIHas(ctx, client, pause.name)
	})
}

// stop ends containerd and leaves no socket behind that nobody answers on. Sockets
// of shims stay: they are how the next start finds the pods.
func (r *Runtime) stop(srv *server.Server) {
	srv.Stop()
	for _, name := range []string{r.Socket(), r.Socket() + ".ttrpc"} {
		os.Remove(name)
	}
}

// Check reports whether the CRI answers and calls itself ready. The pod network is
// not asked about: that is the network's own check.
func (r *Runtime) Check(ctx context.Context) error {
	return withClient(r.Socket(), func(client *containerd.Client) error {
		status, err := cri.NewRuntimeServiceClient(connection(client)).Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return err
		}
		for _, c := range status.Status.GetConditions() {
			if c.Type == cri.RuntimeReady && !c.Status {
				return fmt.Errorf("containerd is not ready: %s", c.Message)
			}
		}
		return nil
	})
}

// lockNode keeps a second process away from the same containers: two containerds
// would wait for each other's databases without a word.
func lockNode(c Config) (unlock func(), err error) {
	for _, dir := range []struct {
		path string
		mode os.FileMode
	}{
		{c.DataDir, 0o755},
		{c.root(), 0o700},
		{c.RunDir, 0o755},
		{c.state(), 0o711}, // containers in user namespaces pass through
		{c.shimSocketDir(), 0o700},
		{c.CNIBinDir, 0o755},
	} {
		if err := os.MkdirAll(dir.path, dir.mode); err != nil {
			return nil, err
		}
	}
	name := filepath.Join(c.root(), "lock")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another process uses the containers in %s; stop it first", c.DataDir)
		}
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}

// setEnvironment sets what containerd can be told in no other way. It is the
// environment of the whole process, and shims inherit it.
func setEnvironment(bin string) {
	// A container that joined its pod's shim records no path of it, and is adopted
	// after a restart by looking for the shim's name.
	path := bin
	if rest := os.Getenv("PATH"); rest != "" {
		path += ":" + rest
	}
	os.Setenv("PATH", path)
	// Layers would be decompressed with programs of the host.
	os.Setenv("CONTAINERD_DISABLE_PIGZ", "1")
	os.Setenv("CONTAINERD_DISABLE_IGZIP", "1")
}

// clearLeftovers removes what a process that was killed had mounted or written in
// passing, and sends the mounts that containerd makes in passing to the data directory.
func clearLeftovers(c Config) error {
	tmp := c.tempDir()
	if err := mounts.DetachBelow(tmp); err != nil {
		return fmt.Errorf("clear %s: %w", tmp, err)
	}
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o700); err != nil {
		return err
	}
	return mount.SetTempMountLocation(tmp)
}

// saveKlogFlags returns a function that undoes what containerd's CRI does to klog
// when it starts: it raises the verbosity of the whole process, Kubernetes included.
func saveKlogFlags() (restore func()) {
	flags := flag.NewFlagSet("klog", flag.ContinueOnError)
	klog.InitFlags(flags)
	saved := map[string]string{}
	for _, name := range []string{"v", "logtostderr", "stderrthreshold", "legacy_stderr_threshold_behavior"} {
		if f := flags.Lookup(name); f != nil {
			saved[name] = f.Value.String()
		}
	}
	return func() {
		for name, value := range saved {
			// They came from the same flags, which therefore accept them.
			_ = flags.Set(name, value)
		}
	}
}

// poll calls done until it says so, until limit has passed or ctx ends.
func poll(ctx context.Context, limit time.Duration, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-tick.C:
		}
	}
}
