package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	goruntime "runtime"
	"sync"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	internalapi "k8s.io/cri-api/pkg/apis"
	"k8s.io/kubernetes/pkg/kubelet"
	"k8s.io/kubernetes/pkg/kubelet/cadvisor"
	"k8s.io/kubernetes/pkg/kubelet/cm"
	kubeconfig "k8s.io/kubernetes/pkg/kubelet/config"
	"k8s.io/kubernetes/pkg/kubelet/status"
	"k8s.io/kubernetes/pkg/util/oom"

	"kedge/internal/atomicfile"
	"kedge/internal/lifecycle"
)

// Upstream's kubelet is written for a process of its own: it exits the process when a part of it does not
// start, and it cannot be started twice in one process, because its HTTP server is never shut down, many of its
// loops never end, and the kubelet object registers its metrics. So there are two kinds of failures:
//
//   - Before upstream's kubelet has started (its state files read, its managers created), Run fails and may be
//     called again.
//   - After it has started, a failure is final for this process. Calls that would exit the process are
//     intercepted: the goroutine ends instead, and the remaining parts of the kubelet can no longer call the
//     API, so that the cluster sees the node as not ready.

// errStarted tells the user what to do about a kubelet that failed after it had started.
var errStarted = errors.New("the kubelet cannot be started a second time in one process: fix the problem, then restart kedge")

// maxLateFailures is the maximum number of failed starts that came so far that they leave API watches behind, which
// upstream never ends.
const maxLateFailures = 20

// attempt is one run of upstream's kubelet.
type attempt struct {
	failed chan error // receives the error for which upstream would have exited the process

	mu    sync.Mutex
	ended bool // the attempt has ended; guarded by mu
	late  bool // upstream created the kubelet object; guarded by mu
}

func newAttempt() *attempt { return &attempt{failed: make(chan error, 1)} }

// fatal records a failure for which upstream exits the process, and ends the goroutine.
func (a *attempt) fatal(err error) {
	a.note(err)
	goruntime.Goexit()
}

func (a *attempt) note(err error) {
	select {
	case a.failed <- err:
	default: // the first failure is the cause of the others
	}
}

func (a *attempt) end() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ended = true
}

func (a *attempt) isLate() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.late
}

// result returns the error of Run for an attempt that failed with err, after lateBefore other attempts that
// were late.
func (a *attempt) result(err error, hasStarted bool, lateBefore int) error {
	switch {
	case hasStarted:
		return lifecycle.Final(fmt.Errorf("%w; %w", err, errStarted))
	case a.isLate() && lateBefore >= maxLateFailures:
		return lifecycle.Final(fmt.Errorf("%w; %d earlier starts have failed like this: fix the problem, then restart kedge", err, lateBefore))
	}
	return err
}

var errEnded = errors.New("the kubelet has failed and can no longer call the API")

// client returns the configuration of the kubelet's API client for one attempt.
func (a *attempt) client(c *rest.Config) *rest.Config {
	c = rest.CopyConfig(c)
	c.Wrap(func(next http.RoundTripper) http.RoundTripper { return &attemptTransport{next, a} })
	return c
}

// attemptTransport sends requests until the attempt has ended.
type attemptTransport struct {
	next    http.RoundTripper
	attempt *attempt
}

func (t *attemptTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	t.attempt.mu.Lock()
	ended := t.attempt.ended
	t.attempt.mu.Unlock()
	if ended {
		return nil, errEnded
	}
	return t.next.RoundTrip(r)
}

// WrappedRoundTripper returns the wrapped RoundTripper to the client library.
func (t *attemptTransport) WrappedRoundTripper() http.RoundTripper { return t.next }

// guard wraps the dependencies whose failures end the kubelet.
func (a *attempt) guard(d *kubelet.Dependencies) {
	d.CAdvisorInterface = &guardedCAdvisor{d.CAdvisorInterface, a}
	// Upstream creates the container manager. The OOM adjuster is the first dependency that upstream calls
	// after that, and before it creates the kubelet.
	adjuster := oom.NewOOMAdjuster()
	apply := adjuster.ApplyOOMScoreAdj
	adjuster.ApplyOOMScoreAdj = func(pid, score int) error {
		if _, done := d.ContainerManager.(*guardedContainerManager); !done && d.ContainerManager != nil {
			d.ContainerManager = &guardedContainerManager{d.ContainerManager, a}
			a.mu.Lock()
			a.late = true
			a.mu.Unlock()
		}
		return apply(pid, score)
	}
	d.OOMAdjuster = adjuster
}

// guardedCAdvisor is cAdvisor. Upstream exits the process if its start fails.
type guardedCAdvisor struct {
	cadvisor.Interface

	attempt *attempt
}

func (m *guardedCAdvisor) Start() error {
	if err := m.Interface.Start(); err != nil {
		m.attempt.fatal(fmt.Errorf("start cAdvisor: %w", err))
	}
	return nil
}

// guardedContainerManager is the container manager. Upstream exits the process if its start fails.
type guardedContainerManager struct {
	cm.ContainerManager

	attempt *attempt
}

func (m *guardedContainerManager) Start(ctx context.Context, node *v1.Node, active cm.ActivePodsFunc, get cm.GetNodeFunc, sources kubeconfig.SourcesReady,
	pods status.PodStatusProvider, runtime internalapi.RuntimeService, localStorage bool) error {
	if err := m.ContainerManager.Start(ctx, node, active, get, sources, pods, runtime, localStorage); err != nil {
		m.attempt.fatal(fmt.Errorf("start the container manager: %w", err))
	}
	return nil
}

// checkStart checks the conditions for which upstream's kubelet would exit the process after it has started.
func (k *Kubelet) checkStart(ctx context.Context) error {
	c := &k.server.KubeletConfiguration
	for _, d := range []string{"pods", "plugins", "plugins_registry", "pod-resources", "checkpoints"} {
		dir := filepath.Join(k.cfg.kubeletDir(), d)
		if err := atomicfile.MkdirAll(dir, 0o750); err != nil {
			return fmt.Errorf("prepare the kubelet's directories: %w", err)
		}
		if err := unix.Access(dir, unix.W_OK); err != nil {
			return fmt.Errorf("the kubelet cannot write to %s: %w; make it writable", dir, err)
		}
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(k.server.Address, fmt.Sprint(c.Port)))
	if err != nil {
		return fmt.Errorf("listen on the kubelet's port: %w; stop the program that uses the port, or choose another port with --kubelet-port", err)
	}
	return l.Close()
}
