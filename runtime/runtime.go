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
	srvconfig "github.com/containerd/containerd/v2/cmd/containerd/server/config"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"kedge/internal/fswatch"
	"kedge/internal/lifecycle"
	"kedge/internal/mounts"
)

// Keys of log attributes.
const (
	keyError   = "err"
	keyPath    = "path"
	keyImage   = "image"
	keyElapsed = "elapsed"
)

// errExited is returned by Run when containerd tried to exit the process.
var errExited = errors.New("containerd gave up; its last messages say why")

// Runtime runs containerd in this process, as a component.
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

// Socket is the path of containerd's socket, which accepts connections once Run has called ready.
func (r *Runtime) Socket() string { return r.cfg.Socket() }

// Run starts containerd, adopts the pods of an earlier process, and serves until ctx is cancelled. Pods
// continue to run after that. It calls ready when a pod can be created, apart from its network.
//
// containerd's plugins are registered once per process with pointers to their configuration, so a process can
// have only one Runtime at a time. After a failure Run may be called again.
func (r *Runtime) Run(ctx context.Context, ready func()) error {
	if err := r.cfg.Validate(); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("running containers requires root; run kedge as root")
	}
	unlock, err := lockNode(r.cfg)
	if err != nil {
		return err
	}
	defer unlock()

	begun := time.Now()
	bin, pause, err := r.prepare(ctx)
	if err != nil {
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
	found, err := r.detect(bin)
	if err != nil {
		return err
	}
	found.pauseImage, found.auths = pause.name, registries.auths()

	exited := catchExits()
	setEnvironment(bin)
	// Plugins keep this context as long as they run; r.stop ends them, in order.
	served := context.WithoutCancel(ctx)
	srv, err := compose(served, containerdConfig(r.cfg, found))
	if err != nil {
		return err
	}
	defer r.stop(srv)
	if err := moveCNICache(srv, r.cfg.cniCache()); err != nil {
		return fmt.Errorf("keep the CNI cache in the run directory: %w", err)
	}
	if err := delayStreamClose(srv); err != nil {
		return fmt.Errorf("delay the closing of streams: %w", err)
	}
	if err := srv.Start(served); err != nil {
		return fmt.Errorf("start containerd: %w", err)
	}
	if err := r.waitReady(ctx, srv, exited, pause, found.snapshotter); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	if err := prunePayloads(r.cfg.payloadRoot(), bin, r.cfg.state()); err != nil {
		r.log.Warn("unpacked programs of earlier versions could not be removed", keyError, err)
	}
	r.log.Info("containerd is ready", "node", r.cfg.NodeName, keyElapsed, time.Since(begun).Round(time.Millisecond),
		"socket", r.Socket(), "snapshotter", found.snapshotter, "cgroup_driver", found.cgroup)
	ready()
	return r.untilUnreachable(ctx, exited)
}

// prepare unpacks the shim and runc into the folder bin. It kills pods whose state was removed, and repairs databases and
// files of the pause image that a crash or the disk has damaged.
func (r *Runtime) prepare(ctx context.Context) (bin string, pause *pauseImage, err error) {
	p, err := embeddedPayload()
	if err != nil {
		return "", nil, err
	}
	if bin, err = p.unpack(r.cfg.payloadRoot()); err != nil {
		return "", nil, fmt.Errorf("unpack shim and runc: %w", err)
	}
	var program bytes.Buffer
	if err := p.program(&program, programPause); err != nil {
		return "", nil, err
	}
	if pause, err = newPauseImage(program.Bytes()); err != nil {
		return "", nil, err
	}
	if err := killStrays(r.cfg, r.log); err != nil {
		return "", nil, fmt.Errorf("kill pods whose state was removed: %w", err)
	}
	if err := clearTemporary(r.cfg); err != nil {
		return "", nil, err
	}
	if err := repairDatabases(ctx, r.cfg, r.log); err != nil {
		return "", nil, err
	}
	mended, err := pause.repairBlobs(r.cfg)
	if err != nil {
		return "", nil, fmt.Errorf("check the pause image: %w", err)
	}
	if len(mended) > 0 {
		r.log.Error("damaged or missing files of the pause image were written again", keyPath, mended)
	}
	return bin, pause, nil
}

// detect returns the settings that depend on the host and on the folder of the unpacked programs.
func (r *Runtime) detect(bin string) (settings, error) {
	snapshotter, err := chooseSnapshotter(r.cfg)
	if err != nil {
		return settings{}, fmt.Errorf("choose snapshotter: %w", err)
	}
	cgroup := r.cfg.CgroupDriver
	if cgroup == "" {
		cgroup = DetectCgroupDriver()
	}
	return settings{
		host:        detectHost(),
		snapshotter: snapshotter,
		cgroup:      cgroup,
		shim:        filepath.Join(bin, programShim),
		runc:        filepath.Join(bin, programRunc),
	}, nil
}

// catchExits makes a library that exits the process end its goroutine instead, so that the API server does not end with it.
// The channel has a value when that has happened.
func catchExits() <-chan struct{} {
	exited := lifecycle.NewWakeup()
	logrus.StandardLogger().ExitFunc = func(int) {
		exited.Wake()
		goruntime.Goexit()
	}
	return exited
}

// compose creates containerd with its plugins, without starting it.
func compose(ctx context.Context, config *srvconfig.Config) (*server.Server, error) {
	if err := server.CreateTopLevelDirectories(config); err != nil {
		return nil, fmt.Errorf("create containerd's directories: %w", err)
	}
	registerPluginSet()
	restoreKlogFlags := saveKlogFlags()
	srv, err := server.New(ctx, config)
	restoreKlogFlags()
	if err != nil {
		closePlugins()
		return nil, fmt.Errorf("compose containerd: %w", err)
	}
	return srv, nil
}

// untilUnreachable returns nil when ctx ends, and an error when containerd has exited or its socket was removed.
func (r *Runtime) untilUnreachable(ctx context.Context, exited <-chan struct{}) error {
	removed := make(chan string, 1)
	watch, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { removed <- fswatch.Removed(watch, r.Socket()) }()
	select {
	case <-ctx.Done():
		return nil
	case <-exited:
		return errExited
	case name := <-removed:
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("%s: %w", name, errRemoved)
	}
}

// errRemoved is returned by Run when containerd's socket file has disappeared.
var errRemoved = errors.New("the socket was removed while kedge was running; do not remove files from the run directory")

// waitReady waits until the CRI has recovered the running pods, and creates the pause image, which the CRI
// would otherwise try to pull.
func (r *Runtime) waitReady(ctx context.Context, srv *server.Server, exited <-chan struct{}, pause *pauseImage, snapshotter string) error {
	recovered := make(chan struct{})
	go func() {
		srv.Wait()
		close(recovered)
	}()
	select {
	case <-recovered:
	case <-exited:
		return errExited
	case <-ctx.Done():
		return ctx.Err()
	}

	return withClient(r.Socket(), func(client *containerd.Client) error {
		ctx := namespaces.WithNamespace(ctx, criNamespace)
		if err := pause.ensure(ctx, client, snapshotter); err != nil {
			return err
		}
		return waitForCRI(ctx, client, pause.name)
	})
}

// stop stops containerd and removes its sockets. The sockets of shims stay: the next start finds the pods by
// them.
func (r *Runtime) stop(srv *server.Server) {
	srv.Stop()
	for _, name := range []string{r.Socket(), r.Socket() + ".ttrpc"} {
		os.Remove(name)
	}
}

// Check reports whether the CRI answers and is ready. It ignores the pod network, which has its own check.
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

// lockNode prevents a second process from using the same containers: two instances of containerd would wait for
// each other's databases silently.
func lockNode(c Config) (unlock func(), err error) {
	for _, dir := range []struct {
		path string
		mode os.FileMode
	}{
		{c.DataDir, 0o755},
		{c.root(), 0o700},
		{c.RunDir, 0o755},
		{c.state(), 0o711}, // must be traversable for containers in user namespaces
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

// setEnvironment sets the environment variables that are the only way to configure some parts of containerd.
// They apply to the whole process, and shims inherit them.
func setEnvironment(bin string) {
	// A container that joined its pod's shim has no record of the shim's path; when containerd adopts it after
	// a restart, it looks for the shim by name in PATH.
	path := bin
	if rest := os.Getenv("PATH"); rest != "" {
		path += ":" + rest
	}
	os.Setenv("PATH", path)
	// containerd would decompress layers with programs of the host.
	os.Setenv("CONTAINERD_DISABLE_PIGZ", "1")
	os.Setenv("CONTAINERD_DISABLE_IGZIP", "1")
}

// clearTemporary removes the temporary files and mounts of a killed process, and makes containerd create
// temporary mounts in the data directory.
func clearTemporary(c Config) error {
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

// saveKlogFlags returns a function that restores klog's flags. containerd's CRI raises the verbosity of the
// whole process, including Kubernetes, when it starts.
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
			// The values were read from the same flags, so Set accepts them.
			_ = flags.Set(name, value)
		}
	}
}

// poll calls done every 10 ms until it returns true, or until limit has passed or ctx ends.
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
