package upgrades

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/internal/lifecycle"
)

// Config is the configuration of the controller.
type Config struct {
	Own string // the name of this server's node
	Dir string // for executables; the controller makes and removes it
	// Source is where the executables come from: the address of the releases, and the client.
	Source appliance.Source
	// Keys returns the keys of releases that this machine trusts.
	Keys func() ([]release.Key, error)
	// Servers returns the names of the servers.
	Servers func(context.Context) ([]string, error)
	// Dial connects to kedge itself on a node, also on this one.
	Dial func(ctx context.Context, node string) (net.Conn, error)
	// Define creates the kind, with [Definition], and waits until the API serves it.
	Define func(ctx context.Context) error
}

// retryDelay is the time after which an upgrade that waits is looked at again.
const retryDelay = time.Minute

// settleDelay is the time after the end of an upgrade in which the informer learns of it.
const settleDelay = 100 * time.Millisecond

// Controller is the component that carries out Upgrades. It runs on the server that leads. While there is no Upgrade, it only
// has a watch.
type Controller struct {
	cfg    Config
	log    *slog.Logger
	client kubernetes.Interface
	any    dynamic.Interface
	wake   lifecycle.Wakeup // an upgrade was created, changed or deleted
	retry  time.Duration

	recorder record.EventRecorder // of Run
	fetched  fetched              // of the upgrade that is carried out or waits
}

// New returns the controller. client acts as the user system:kedge:upgrades.
func New(cfg Config, client *rest.Config, log *slog.Logger) (*Controller, error) {
	typed, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the client of upgrades: %w", err)
	}
	untyped, err := dynamic.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the client of upgrades: %w", err)
	}
	return newController(cfg, typed, untyped, log), nil
}

func newController(cfg Config, client kubernetes.Interface, untyped dynamic.Interface, log *slog.Logger) *Controller {
	return &Controller{cfg: cfg, log: log, client: client, any: untyped, wake: lifecycle.NewWakeup(), retry: retryDelay}
}

// Name implements lifecycle.Component.
func (c *Controller) Name() string { return "upgrades" }

// Run implements lifecycle.Component. It calls ready at once: the cluster works without this controller.
func (c *Controller) Run(ctx context.Context, ready func()) error {
	ready()
	if err := c.cfg.Define(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	informer := dynamicinformer.NewFilteredDynamicInformer(c.any, Resource, "", 0, cache.Indexers{}, nil).Informer()
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: func(any) { c.wake.Wake() }, DeleteFunc: func(any) { c.wake.Wake() },
		UpdateFunc: func(a, b any) {
			// The controller's own changes of the status are none for it.
			if generation(a) != generation(b) {
				c.wake.Wake()
			}
		},
	})
	if err != nil {
		return fmt.Errorf("follow upgrades: %w", err)
	}
	// A broadcaster has goroutines, and a controller is made for each term in which this server leads.
	events := record.NewBroadcaster()
	events.StartRecordingToSink(&v1core.EventSinkImpl{Interface: c.client.CoreV1().Events("")})
	defer events.Shutdown()
	c.recorder = events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kedge-upgrades"})
	var watch sync.WaitGroup
	watch.Go(func() { informer.RunWithContext(ctx) })
	defer watch.Wait()
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return nil // it was stopped
	}
	defer c.drop("")
	c.wake.Wake()
	var due <-chan time.Time // nil while nothing waits for a time
	running := ""            // the upgrade that is carried out
	ended := make(chan time.Duration, 1)
	for {
		select {
		case <-ctx.Done():
			if running != "" {
				<-ended
			}
			return nil
		case <-c.wake:
		case <-due:
		case pause := <-ended:
			running, due = "", time.After(max(pause, settleDelay))
			continue
		}
		open := c.open(informer.GetStore().List())
		if running == "" && len(open) > 0 {
			running, due = open[0].Name, nil
			go func() { ended <- c.advance(ctx, open[0].Name) }()
		}
		c.queue(ctx, open, running)
	}
}

func generation(o any) int64 {
	if u, ok := o.(metav1.Object); ok {
		return u.GetGeneration()
	}
	return 0
}

// open returns the upgrades that have not ended, the oldest first.
func (c *Controller) open(objects []any) (open []*Upgrade) {
	for _, o := range objects {
		u := &Upgrade{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.(*unstructured.Unstructured).Object, u); err != nil {
			c.log.Warn("an upgrade cannot be read", "err", err)
			continue
		}
		if !u.ended() && u.DeletionTimestamp == nil {
			open = append(open, u)
		}
	}
	slices.SortFunc(open, func(a, b *Upgrade) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	return open
}

// queue writes the status of the upgrades that wait for the running one.
func (c *Controller) queue(ctx context.Context, open []*Upgrade, running string) {
	for _, u := range open {
		if u.Name == running {
			continue
		}
		err := c.change(ctx, u, func(s *Status) { s.Phase, s.Message = Waiting, "it begins when upgrade "+running+" has ended" })
		if err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) {
			c.log.Warn("the status of an upgrade could not be written", "upgrade", u.Name, "err", err)
		}
	}
}

// advance carries out an upgrade as far as possible now. It returns the time after which it is to be called again; 0 if the upgrade
// has ended.
func (c *Controller) advance(ctx context.Context, name string) time.Duration {
	u, err := c.get(ctx, name) // the informer may not know what the last round has written
	if apierrors.IsNotFound(err) || err == nil && (u.ended() || u.DeletionTimestamp != nil) {
		c.drop(name)
		return 0
	}
	if err == nil {
		err = c.carryOut(ctx, u)
	}
	if ctx.Err() != nil {
		return 0 // the server that leads then goes on
	}
	var closed *closedError
	var pause time.Duration
	result := func(s *Status) { s.Phase, s.Message, s.CompletionTime = Succeeded, s.progress(), now() }
	switch {
	case err == nil:
		c.event(u, corev1.EventTypeNormal, "Upgraded", "all nodes have "+u.Status.Version)
	case errors.Is(err, errChanged):
		return time.Nanosecond
	case errors.As(err, &closed):
		pause = min(max(time.Until(closed.opens), time.Second), c.retry) // the clock of a machine may be set meanwhile
		result = func(s *Status) { s.Phase, s.Message = Waiting, closed.Error() }
	case final(err):
		c.event(u, corev1.EventTypeWarning, "UpgradeFailed", err.Error())
		c.log.Error("an upgrade has failed", "upgrade", name, "err", err)
		result = func(s *Status) { s.Phase, s.Message, s.CompletionTime = Failed, err.Error(), now() }
	default:
		c.log.Warn("an upgrade waits", "upgrade", name, "err", err)
		pause = c.retry
		result = func(s *Status) { s.Phase, s.Message = Waiting, err.Error() }
	}
	if u == nil {
		return c.retry
	}
	if err == nil || closed != nil || final(err) {
		c.drop(name)
	}
	if err := c.change(ctx, u, result); err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) {
		c.log.Warn("the status of an upgrade could not be written", "upgrade", name, "err", err)
		return c.retry
	}
	return pause
}

// errChanged means that the object was changed or deleted meanwhile.
var errChanged = errors.New("the upgrade was changed")

// closedError means that the window is not open.
type closedError struct{ opens time.Time }

func (e *closedError) Error() string {
	return "it waits for its window, which opens at " + e.opens.Format("Mon 2006-01-02 15:04 MST")
}

// failure marks an error after which the upgrade is not tried again.
type failure struct{ error }

func (f failure) Unwrap() error { return f.error }

func final(err error) bool {
	var f failure
	return errors.As(err, &f)
}

// get returns an upgrade as it is now.
func (c *Controller) get(ctx context.Context, name string) (*Upgrade, error) {
	o, err := c.any.Resource(Resource).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	u := &Upgrade{}
	return u, runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, u)
}

func (c *Controller) event(u *Upgrade, eventType, reason, message string) {
	if u != nil {
		c.recorder.Event(&corev1.ObjectReference{APIVersion: Resource.GroupVersion().String(), Kind: kind.Kind, Name: u.Name, UID: u.UID}, eventType, reason, message)
	}
}

// statusWriter writes the status of one upgrade, which several goroutines change.
type statusWriter struct {
	c  *Controller
	u  *Upgrade
	mu sync.Mutex // guards the status of u
}

func (w *statusWriter) change(ctx context.Context, f func(s *Status)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.c.change(ctx, w.u, f)
}
