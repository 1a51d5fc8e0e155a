package policy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"kedge/network/cni"
	"kedge/network/nft"
)

// Config is what the policies of a node are told.
type Config struct {
	NodeName string
	// DNS are the addresses of the cluster's resolver. It is no pod, but policies
	// are written as if it were: it is reached through rules that select pods with
	// the label k8s-app=kube-dns of namespace kube-system, or all pods of that.
	DNS []netip.Addr
}

const (
	// patience is how long a new pod waits to become known before it starts with
	// all its connections refused. Kubelet and policies follow the same API, so
	// one has seen the pod not long after the other.
	patience = 2 * time.Second
	// retryPause is the time between attempts to write rules after a failure.
	retryPause = time.Second
	// settle is how long repair waits after rules were changed by others: those
	// who load a firewall make several changes.
	settle = 200 * time.Millisecond
	// repairPause is the least time between two comparisons but the one after settle.
	repairPause = time.Second
	// repairEvery is how often the rules are compared even though no event said
	// that somebody changed them.
	repairEvery = 5 * time.Minute
)

// ErrNotSynced says that the API's objects have not been read yet.
var ErrNotSynced = errors.New("network policies are not known yet")

// Policy is the component that enforces network policies on one node.
type Policy struct {
	log     *slog.Logger
	synced  []cache.InformerSynced
	cluster *clusterWatch // nil if cluster-wide policies are not followed

	mu      sync.Mutex // guards what follows
	engine  *engine
	failure error         // why the rules are not what they should be
	changed chan struct{} // closed at the next change of what is known, and replaced

	wake chan struct{} // asks Run to write what has changed; holds one request
}

// New returns the policies of a node; factory is where it asks for pods,
// namespaces and policies, and client, unless it is nil, for cluster-wide ones.
// Until the factory runs and all of them are known, new pods are refused everything
// and the rules of an earlier process stay.
func New(cfg Config, factory informers.SharedInformerFactory, client dynamic.Interface, log *slog.Logger) (*Policy, error) {
	p := &Policy{
		log: log, engine: newEngine(nft.NewPolicyTable(cfg.NodeName)),
		changed: make(chan struct{}), wake: make(chan struct{}, 1),
	}
	if client != nil {
		p.cluster = &clusterWatch{policy: p, client: client}
		p.synced = append(p.synced, p.cluster.hasSynced)
	}
	resolver := newResolver(cfg.DNS)
	p.engine.setPod(resolver.key, resolver)
	err := errors.Join(
		follow(p, factory.Core().V1().Pods().Informer(), func(pod *corev1.Pod, gone bool) {
			key := podKey{pod.Namespace, pod.Name}
			if gone {
				p.engine.setPod(key, nil)
			} else {
				p.engine.setPod(key, newPod(pod))
			}
		}),
		follow(p, factory.Core().V1().Namespaces().Informer(), func(ns *corev1.Namespace, gone bool) {
			switch {
			case gone:
				p.engine.setNamespace(ns.Name, nil)
			case ns.Labels == nil:
				p.engine.setNamespace(ns.Name, labels.Set{})
			default:
				p.engine.setNamespace(ns.Name, ns.Labels)
			}
		}),
		follow(p, factory.Networking().V1().NetworkPolicies().Informer(), func(np *networkingv1.NetworkPolicy, gone bool) {
			key := podKey{np.Namespace, np.Name}
			if gone {
				p.engine.setPolicy(key, nil)
				return
			}
			read, err := newPolicy(np)
			if err != nil {
				p.log.Warn("part of a network policy is not understood and allows nothing", "error", err)
			}
			p.engine.setPolicy(key, read)
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("follow network policies: %w", err)
	}
	return p, nil
}

// newResolver is the pod as which policies see the resolver: that of other
// clusters, which they were written for.
func newResolver(addrs []netip.Addr) *pod {
	return &pod{
		key: podKey{metav1.NamespaceSystem, "resolver of kedge"}, labels: labels.Set{"k8s-app": "kube-dns"}, addrs: addrs, peer: true,
		ports: map[string][]port{"dns": {{unix.IPPROTO_UDP, 53}}, "dns-tcp": {{unix.IPPROTO_TCP, 53}}},
	}
}

// follow calls set, with p.mu held, for every change of a kind of object.
func follow[T any](p *Policy, informer cache.SharedIndexInformer, set func(obj T, gone bool)) error {
	change := func(obj any, gone bool) {
		if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = last.Obj
		}
		typed, ok := obj.(T)
		if !ok {
			return
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		set(typed, gone)
		p.announce()
	}
	reg, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { change(obj, false) },
		UpdateFunc: func(_, obj any) { change(obj, false) },
		DeleteFunc: func(obj any) { change(obj, true) },
	})
	if err != nil {
		return err
	}
	p.synced = append(p.synced, reg.HasSynced)
	return nil
}

// announce asks for what was staged to be written, and wakes those who wait for
// a pod to become known. Caller holds mu.
func (p *Policy) announce() {
	if !p.engine.synced {
		return // nothing is written before all is known
	}
	p.wakeUp()
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *Policy) wakeUp() {
	select {
	case p.wake <- struct{}{}:
	default: // asked for already
	}
}

// Name returns "policy".
func (p *Policy) Name() string { return "policy" }

// Run keeps the rules in step until ctx is cancelled. It is ready when the rules
// say what the API does. The pods that the node has must be known by then: see
// Restore.
func (p *Policy) Run(ctx context.Context, ready func()) error {
	ready = sync.OnceFunc(ready)
	inner, fail := context.WithCancelCause(ctx)
	var parts sync.WaitGroup
	defer parts.Wait()
	defer fail(nil)
	if p.cluster != nil {
		parts.Go(func() { p.cluster.run(inner) })
	}
	if !cache.WaitForCacheSync(ctx.Done(), p.synced...) {
		return nil
	}
	p.mu.Lock()
	p.engine.judgeAll()
	p.announce()
	p.mu.Unlock()

	damaged := make(chan struct{}, 1)
	parts.Go(func() {
		err := nft.Watch(inner, func() {
			select {
			case damaged <- struct{}{}:
			default:
			}
		})
		if err != nil {
			fail(err)
		}
	})
	p.work(inner, damaged, ready)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.engine.table.Close(); err != nil {
		p.log.Debug("nftables not closed", "error", err)
	}
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// work writes, and repairs, until ctx ends.
func (p *Policy) work(ctx context.Context, damaged <-chan struct{}, ready func()) {
	regular := time.NewTicker(repairEvery)
	defer regular.Stop()
	retry := time.NewTimer(retryPause)
	retry.Stop()
	defer retry.Stop()
	again := time.NewTimer(settle)
	again.Stop()
	defer again.Stop()
	var looked time.Time // when the rules were last compared
	said := ""           // what the log has of the failure at hand
	for {
		var err error
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			err = p.commit()
		case <-retry.C:
			err = p.commit()
		case <-damaged:
			// At once, since until then nothing may be enforced, and once more when
			// whoever changes rules is likely to be done. Not all the time, though:
			// there may be another node on the machine, with tables of its own.
			if time.Since(looked) < repairPause {
				again.Reset(repairPause)
				continue
			}
			err = p.repair()
			looked = time.Now()
			again.Reset(settle)
		case <-again.C:
			err = p.repair()
			looked = time.Now()
		case <-regular.C:
			err = p.repair()
		}
		if err != nil {
			if text := err.Error(); text != said {
				p.log.Error("network policies cannot be enforced as they are; trying again", "error", err)
				said = text
			}
			retry.Reset(retryPause)
			continue
		}
		said = ""
		ready()
	}
}

func (p *Policy) commit() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.write()
}

func (p *Policy) repair() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failure != nil {
		return nil // commit is tried again, and writes all
	}
	repaired, err := p.engine.table.Repair()
	if repaired {
		p.log.Warn("rules repaired: somebody removed or changed them", "table", p.engine.table.Name())
	}
	p.failure = err
	return err
}

// Check says why policies are not enforced as they are, or nil.
func (p *Policy) Check(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.engine.synced {
		return ErrNotSynced
	}
	return p.failure
}

// Restore says which pods the node has from before this process began. What is
// decided about them stays as it is until the API's objects are known.
func (p *Policy) Restore(all []cni.Attachment) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range all {
		p.engine.attach(newAttachment(a))
	}
	p.announce()
}

// Attach returns when the policies for a new pod are in force: call it before the
// pod can send anything. Where it must be known more about the pod than is, it
// waits a moment, and then lets the pod start with all connections refused until
// that is known. An error means that the pod must not start; Detach is to be
// called all the same.
func (p *Policy) Attach(ctx context.Context, a cni.Attachment) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := newAttachment(a)
	p.engine.attach(at)
	if err := p.enforce(at); err != nil {
		return fmt.Errorf("enforce network policies for %s: %w", at.pod, err)
	}
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for !at.certain {
		changed := p.changed
		p.mu.Unlock()
		var late error
		select {
		case <-changed:
		case <-ctx.Done():
			late = context.Cause(ctx)
		case <-deadline.C:
			late = context.DeadlineExceeded
		}
		p.mu.Lock()
		if late != nil {
			p.log.Warn("pod starts with all its connections refused: the API has not told of it yet", "pod", at.pod.String())
			return nil
		}
	}
	if err := p.enforce(at); err != nil {
		return fmt.Errorf("enforce network policies for %s: %w", at.pod, err)
	}
	return nil
}

// enforce makes the kernel know what is decided about an attachment. Caller holds mu.
func (p *Policy) enforce(at *attachment) error {
	if !p.engine.synced {
		return p.engine.table.Hold(at.addrs)
	}
	return p.writeNow()
}

// writeNow is [Policy.write] for those who do not try again themselves: Run does.
// Caller holds mu.
func (p *Policy) writeNow() error {
	err := p.write()
	if err != nil {
		p.wakeUp()
	}
	return err
}

// write commits what is staged. Caller holds mu.
func (p *Policy) write() error {
	p.failure = p.engine.table.Commit()
	if damage := p.engine.table.Damaged(); damage != nil {
		p.log.Warn("rules written anew: somebody removed or changed them", "table", p.engine.table.Name(), "cause", damage)
	}
	return p.failure
}

// Detach says that a pod is gone. Call it before its addresses are given to
// another one.
func (p *Policy) Detach(owner string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.engine.detach(owner)
	if !p.engine.synced {
		return nil // an entry that is left over goes with the first Commit
	}
	return p.writeNow()
}

var _ cni.Judge = (*Policy)(nil)
