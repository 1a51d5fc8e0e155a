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

	"kedge/internal/lifecycle"
	"kedge/network/cni"
	"kedge/network/nft"
	"kedge/network/nft/policies"
)

// Config is the configuration of the policies of a node.
type Config struct {
	NodeName string
	// DNS are the addresses of the cluster's resolver. It is not a pod, but policies are
	// written as if it were: rules that select pods with the label k8s-app=kube-dns in
	// namespace kube-system, or all pods there, include it.
	DNS []netip.Addr
}

const (
	// attachTimeout is the time for which a new pod waits to become known before it starts
	// with all connections denied. Kubelet and policies watch the same API, so the policies
	// see the pod soon after the kubelet.
	attachTimeout = 2 * time.Second
	// retryPause is the time between attempts to write rules after a failure.
	retryPause = time.Second
	// settle is the delay of the second comparison after a foreign change of rules:
	// programs that load a firewall make several changes.
	settle = 200 * time.Millisecond
	// repairPause is the minimum time between two comparisons, except for the one after
	// settle.
	repairPause = time.Second
	// repairEvery is the interval of comparisons that no event has requested.
	repairEvery = 5 * time.Minute
)

// ErrNotSynced means that the API's objects have not been read yet.
var ErrNotSynced = errors.New("network policies have not been read from the API yet")

// Policy is the component that enforces network policies on one node.
type Policy struct {
	log     *slog.Logger
	synced  []cache.InformerSynced
	cluster *clusterWatch // nil if cluster-wide policies are not followed

	mu      sync.Mutex // guards what follows
	engine  *engine
	failure error         // of the last write or repair
	changed chan struct{} // closed and replaced at the next change of the engine

	wake lifecycle.Wakeup // requests a write
}

// New returns the policies of a node; factory provides pods, namespaces and policies, and
// client, unless it is nil, cluster-wide policies. Until the factory runs and all objects
// have been read, all connections of new pods are denied and the rules of an earlier
// process stay.
func New(cfg Config, factory informers.SharedInformerFactory, client dynamic.Interface, log *slog.Logger) (*Policy, error) {
	p := &Policy{
		log: log, engine: newEngine(policies.NewTable(cfg.NodeName)),
		changed: make(chan struct{}), wake: lifecycle.NewWakeup(),
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
				p.log.Warn("cannot read part of a NetworkPolicy; that part allows nothing", "err", err)
			}
			p.engine.setPolicy(key, read)
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("follow network policies: %w", err)
	}
	return p, nil
}

// newResolver returns the resolver as a pod: the DNS pod of other clusters, for which
// policies are written.
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
		p.notify()
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

// notify requests a write of the staged changes, and wakes the requests that wait for a pod
// to become known. Caller holds mu.
func (p *Policy) notify() {
	if !p.engine.synced {
		return // nothing is written before all objects have been read
	}
	p.wake.Wake()
	close(p.changed)
	p.changed = make(chan struct{})
}

// Name returns "policy".
func (p *Policy) Name() string { return "policy" }

// Run keeps the rules in step until ctx is cancelled. It is ready when the rules match the
// API's objects. The node's pods must be known by then: see Restore.
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
	p.engine.applyAll()
	p.notify()
	p.mu.Unlock()

	damaged := lifecycle.NewWakeup()
	parts.Go(func() {
		err := nft.Watch(inner, func() {
			damaged.Wake()
		})
		if err != nil {
			fail(err)
		}
	})
	p.loop(inner, damaged, ready)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.engine.table.Close(); err != nil {
		p.log.Debug("nftables not closed", "err", err)
	}
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// loop writes and repairs rules until ctx ends.
func (p *Policy) loop(ctx context.Context, damaged lifecycle.Wakeup, ready func()) {
	regular := time.NewTicker(repairEvery)
	defer regular.Stop()
	retry := time.NewTimer(retryPause)
	retry.Stop()
	defer retry.Stop()
	recheck := time.NewTimer(settle)
	recheck.Stop()
	defer recheck.Stop()
	var lastCheck time.Time // when the rules were last compared
	logged := ""            // the failure that the log has already
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
			// At once, because policies may not be enforced until then, and again when the
			// other program is likely to have finished. Not all the time, though: another
			// node on the machine may change tables of its own.
			if time.Since(lastCheck) < repairPause {
				recheck.Reset(repairPause)
				continue
			}
			err = p.repair()
			lastCheck = time.Now()
			recheck.Reset(settle)
		case <-recheck.C:
			err = p.repair()
			lastCheck = time.Now()
		case <-regular.C:
			err = p.repair()
		}
		if err != nil {
			if text := err.Error(); text != logged {
				p.log.Error("cannot write the rules of network policies; retrying", "err", err)
				logged = text
			}
			retry.Reset(retryPause)
			continue
		}
		logged = ""
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
		return nil // commit is retried, and writes all
	}
	repaired, err := p.engine.table.Repair()
	if repaired {
		p.log.Warn("nftables rules repaired: another program had removed or changed them", "table", p.engine.table.Name())
	}
	p.failure = err
	return err
}

// Check returns why policies are not enforced, or nil.
func (p *Policy) Check(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.engine.synced {
		return ErrNotSynced
	}
	return p.failure
}

// Restore sets the pods that were attached before this process started. Their rules stay
// unchanged until the API's objects have been read.
func (p *Policy) Restore(all []cni.Attachment) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, a := range all {
		p.engine.attach(newAttachment(a))
	}
	p.notify()
}

// Attach returns when the policies for a new pod are in force: call it before the pod can
// send anything. If the pod is not known yet, it waits a moment, and then lets the pod
// start with all connections denied until it is known. After an error the pod must not
// start; Detach is to be called nevertheless.
func (p *Policy) Attach(ctx context.Context, a cni.Attachment) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	at := newAttachment(a)
	p.engine.attach(at)
	if err := p.enforce(at); err != nil {
		return fmt.Errorf("enforce network policies for %s: %w", at.pod, err)
	}
	deadline := time.NewTimer(attachTimeout)
	defer deadline.Stop()
	for !at.resolved {
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
			p.log.Warn("pod starts with all connections denied: the watch of pods has not delivered it yet", "pod", at.pod.String())
			return nil
		}
	}
	if err := p.enforce(at); err != nil {
		return fmt.Errorf("enforce network policies for %s: %w", at.pod, err)
	}
	return nil
}

// enforce writes the rules of an attachment. Caller holds mu.
func (p *Policy) enforce(at *attachment) error {
	if !p.engine.synced {
		return p.engine.table.Isolate(at.addrs)
	}
	return p.writeNow()
}

// writeNow is [Policy.write] for callers that do not retry themselves: Run retries. Caller
// holds mu.
func (p *Policy) writeNow() error {
	err := p.write()
	if err != nil {
		p.wake.Wake()
	}
	return err
}

// write commits the staged changes. Caller holds mu.
func (p *Policy) write() error {
	p.failure = p.engine.table.Commit()
	if damage := p.engine.table.Damaged(); damage != nil {
		p.log.Warn("nftables rules rewritten: another program had removed or changed them", "table", p.engine.table.Name(), "err", damage)
	}
	return p.failure
}

// Detach removes a pod. Call it before its addresses are given to another pod.
func (p *Policy) Detach(owner string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.engine.detach(owner)
	if !p.engine.synced {
		return nil // the first Commit removes a remaining entry
	}
	return p.writeNow()
}

var _ cni.PolicyEngine = (*Policy)(nil)
