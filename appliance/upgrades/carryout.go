package upgrades

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/appliance/remote"
	"kedge/internal/errorkind"
)

// carryOut upgrades the nodes that do not have the version. It returns nil when all have it, a [failure] if the upgrade has
// failed, and another error if it is to be tried again.
func (c *Controller) carryOut(ctx context.Context, u *Upgrade) error {
	u.renew()
	w := &statusWriter{c: c, u: u}
	if err := w.uncordonEnded(ctx); err != nil {
		return err
	}
	if err := u.checkTimes(); err != nil {
		return err
	}
	keys, err := c.keys()
	if err != nil {
		return err
	}
	// A node whose upgrade has begun is followed to its end, also after the window.
	if !u.Status.has(NodeUpgrading) {
		if err := u.inWindow(); err != nil {
			return err
		}
	}
	targets, absent, err := c.targets(ctx)
	if err != nil {
		return err
	}
	if len(targets) == 0 {
		return errors.New("it waits for a node that is Ready")
	}
	if err := w.change(ctx, func(s *Status) {
		if s.StartTime == nil {
			s.Phase, s.Message = Running, "the release is fetched"
		}
	}); err != nil {
		return err
	}
	files, version, err := c.fetch(ctx, u, targets, keys)
	if err != nil {
		return err
	}
	if err := w.begin(ctx, version, slices.Concat(targets, absent)); err != nil {
		return err
	}
	if slices.ContainsFunc(absent, func(t remote.Target) bool { return t.Server }) { // agents must not be newer than a server
		targets = slices.DeleteFunc(targets, func(t remote.Target) bool { return !t.Server })
	}
	if results, err := w.rollout(ctx, targets, files).Run(ctx); err != nil {
		return w.judge(ctx, results, err)
	}
	if err := w.uncordonEnded(ctx); err != nil { // of nodes whose upgrade has ended while no server followed it
		return err
	}
	if len(absent) > 0 {
		var names []string
		for _, t := range absent {
			names = append(names, t.Name)
		}
		return fmt.Errorf("it waits for nodes that are not Ready: %s", strings.Join(names, ", "))
	}
	return nil
}

// renew forgets what was done for an earlier spec, but for the nodes that have to be uncordoned.
func (u *Upgrade) renew() {
	if u.Status.ObservedGeneration == u.Generation {
		return
	}
	earlier := u.Status.Nodes
	u.Status = Status{ObservedGeneration: u.Generation}
	for _, n := range earlier {
		if n.Cordoned {
			u.Status.node(n.Name).Cordoned = true
		}
	}
}

// inWindow returns a [closedError] while the window is closed.
func (u *Upgrade) inWindow() error {
	open, opens, err := u.Spec.Window.at(time.Now())
	switch {
	case err != nil:
		return failure{err}
	case !open:
		return &closedError{opens}
	}
	return nil
}

// maxObserve is the longest time for which an object may have a version observed: the node is on trial until then.
const maxObserve = 24 * time.Hour

func (u *Upgrade) checkTimes() error {
	if observe := u.Spec.Observe.Duration; observe > maxObserve {
		return failure{fmt.Errorf("spec.observe is %s, and can be at most %s", observe, maxObserve)}
	}
	if wait := u.Spec.Wait.Duration; wait > maxObserve {
		return failure{fmt.Errorf("spec.wait is %s, and can be at most %s", wait, maxObserve)}
	}
	return nil
}

// targets returns the nodes that are Ready, and those that are not (absent).
func (c *Controller) targets(ctx context.Context) (ready, absent []remote.Target, err error) {
	servers, err := c.cfg.Servers(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("list the servers: %w", err)
	}
	nodes, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, nil, fmt.Errorf("list the nodes: %w", err)
	}
	all, bare := remote.Targets(nodes.Items, servers)
	if len(bare) > 0 {
		return nil, nil, failure{fmt.Errorf("server %s has no node (--disable-agent), so it cannot be upgraded by an object; run \"kedge upgrade\" on each machine", bare[0])}
	}
	for _, t := range all {
		if t.Ready {
			ready = append(ready, t)
		} else {
			absent = append(absent, t)
		}
	}
	return ready, absent, nil
}

// keys returns the keys of releases that this server trusts.
func (c *Controller) keys() ([]release.Key, error) {
	keys, err := c.cfg.Keys()
	if err == nil && len(keys) == 0 {
		// Without a signature, a user who may write an object could run any executable as root.
		err = fmt.Errorf("server %s trusts no key of releases, and an object takes only what is signed; put the key into %s on the servers, or run \"kedge upgrade --all\"", c.cfg.Own, release.TrustedKeysFile)
	}
	if err != nil {
		return nil, failure{err}
	}
	return keys, nil
}

// fetched is the release that was fetched for an upgrade.
type fetched struct {
	uid        types.UID
	generation int64
	files      map[string]remote.Files
	version    string
}

// fetch fetches the executables, and returns them with the version of their release. While the upgrade is tried again they
// are not fetched again.
func (c *Controller) fetch(ctx context.Context, u *Upgrade, targets []remote.Target, keys []release.Key) (files map[string]remote.Files, version string, err error) {
	missing := func(t remote.Target) bool { _, found := c.fetched.files[t.Arch]; return !found }
	if f := c.fetched; f.uid == u.UID && f.generation == u.Generation && !slices.ContainsFunc(targets, missing) {
		return f.files, f.version, nil
	}
	if err := c.forget(); err != nil {
		return nil, "", err
	}
	source := c.cfg.Source
	source.Version, source.Channel, source.URL, source.Keys = u.Spec.Version, u.Spec.Channel, u.Spec.URL, keys
	if source.URL == "" && u.Status.Version != "" {
		source.Version = u.Status.Version // the channel may have moved on
	}
	if err := os.MkdirAll(c.cfg.Dir, 0o700); err != nil {
		return nil, "", err
	}
	files, _, err = remote.Take(ctx, source, targets, c.cfg.Dir)
	if err != nil {
		if errorkind.ExitCode(err) == errorkind.ExitConfig { // such as a wrong signature
			err = failure{err}
		}
		return nil, "", err
	}
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join(f.Dir, release.VersionName))
		if err != nil {
			return nil, "", err
		}
		version = strings.TrimSpace(string(text))
	}
	if begun := u.Status.Version; begun != "" && begun != version {
		return nil, "", failure{fmt.Errorf("%s has version %s now, and the upgrade has begun with %s", u.Spec.URL, version, begun)}
	}
	c.fetched = fetched{u.UID, u.Generation, files, version}
	return files, version, nil
}

// forget removes what was fetched.
func (c *Controller) forget() error {
	c.fetched = fetched{}
	return os.RemoveAll(c.cfg.Dir)
}

// drop is [Controller.forget] when the executables are not needed any more. An error is only logged: the next fetch removes them.
func (c *Controller) drop(upgrade string) {
	if err := c.forget(); err != nil {
		c.log.Warn("the executables of an upgrade could not be removed", "upgrade", upgrade, "err", err)
	}
}

// begin writes that the upgrade is carried out.
func (w *statusWriter) begin(ctx context.Context, version string, targets []remote.Target) error {
	return w.change(ctx, func(s *Status) {
		if s.StartTime == nil {
			s.StartTime = now()
			w.c.event(w.u, corev1.EventTypeNormal, "UpgradeBegins", "the nodes are upgraded to "+version)
			w.c.log.Info("an upgrade of the cluster begins", "upgrade", w.u.Name, "version", version)
		}
		for _, t := range targets {
			s.node(t.Name)
		}
		s.Phase, s.Version, s.Message = Running, version, s.progress()
	})
}

// progress says how many nodes have the version, and which are being upgraded.
func (s *Status) progress() string {
	text := fmt.Sprintf("%d of %d nodes have %s", s.count(NodeUpgraded), len(s.Nodes), s.Version)
	var names []string
	for _, n := range s.Nodes {
		if n.Phase == NodeUpgrading {
			names = append(names, n.Name)
		}
	}
	if len(names) > 0 {
		text += "; upgrading " + strings.Join(names, ", ")
	}
	return text
}

// rollout returns the rollout to nodes, which writes its progress into the status.
func (w *statusWriter) rollout(ctx context.Context, targets []remote.Target, files map[string]remote.Files) remote.Rollout {
	spec := w.u.Spec
	r := remote.Rollout{
		Own: w.c.cfg.Own, OwnLast: true, Targets: targets, Files: files, Parallel: max(1, spec.Parallel), Dial: w.c.cfg.Dial,
		Begin:  remote.Begin{Observe: cmp.Or(spec.Observe.Duration, appliance.DefaultObserve), Wait: cmp.Or(spec.Wait.Duration, appliance.DefaultPatience)},
		Before: w.before,
		Begun: func(node string) (last string, begun bool) {
			w.mu.Lock()
			defer w.mu.Unlock()
			n := w.u.Status.node(node)
			return n.LastUpgrade, n.Phase == NodeUpgrading
		},
		Progress: func(r remote.Result) { w.note(ctx, r) },
		Say:      func(text string) { w.c.log.Info("upgrade of the cluster", "upgrade", w.u.Name, "node", text) },
	}
	if spec.Drain {
		r.After = func(_ context.Context, node string) error {
			if ctx.Err() != nil {
				return nil // the server that leads then follows the node to its end
			}
			return w.uncordon(ctx, node)
		}
	}
	return r
}

// before is called before the upgrade of a node begins.
func (w *statusWriter) before(ctx context.Context, node string) error {
	live, err := w.c.get(ctx, w.u.Name)
	if apierrors.IsNotFound(err) {
		return errChanged
	}
	if err != nil {
		return err
	}
	if live.UID != w.u.UID || live.Generation != w.u.Generation || live.DeletionTimestamp != nil {
		return errChanged
	}
	if err := w.u.inWindow(); err != nil {
		return err
	}
	if w.u.Spec.Drain {
		return w.drain(ctx, node)
	}
	return nil
}

// note writes the progress with a node. Errors are not returned: the rollout goes on, and the next change writes all.
func (w *statusWriter) note(ctx context.Context, r remote.Result) {
	if ctx.Err() != nil {
		return // the server that leads then goes on from what is written
	}
	err := w.change(ctx, func(s *Status) {
		n := s.node(r.Node)
		switch r.Outcome {
		case remote.Upgrading:
			n.Phase, n.LastUpgrade, n.Message = NodeUpgrading, r.Last, ""
		case remote.Done, remote.Had:
			if n.Phase != NodeUpgraded {
				w.c.event(w.u, corev1.EventTypeNormal, "NodeUpgraded", "node "+r.Node+" has "+s.Version)
			}
			n.Phase, n.Message = NodeUpgraded, ""
		case remote.Undone:
			n.Phase, n.Message = NodeWentBack, r.Reason
			w.c.event(w.u, corev1.EventTypeWarning, "NodeWentBack", "node "+r.Node+": "+r.Reason)
		default: // what has begun is followed by the next round
			n.Message = r.Reason
		}
		s.Message = s.progress()
	})
	if err != nil && ctx.Err() == nil {
		w.c.log.Warn("the status of an upgrade could not be written", "upgrade", w.u.Name, "err", err)
	}
}

// judge returns a [failure] if a rollout has ended with an error that is not to be tried again.
func (w *statusWriter) judge(ctx context.Context, results []remote.Result, err error) error {
	var refused *remote.RefusedError
	undone := slices.ContainsFunc(results, func(r remote.Result) bool { return r.Outcome == remote.Undone })
	if final(err) || !undone && !errors.As(err, &refused) || ctx.Err() != nil {
		return err
	}
	for _, r := range results {
		if r.Outcome == remote.Untouched && r.Reason != "" || r.Outcome == remote.Failed {
			_ = w.change(ctx, func(s *Status) { n := s.node(r.Node); n.Phase, n.Message = NodeFailed, r.Reason }) // the caller writes all
		}
	}
	return failure{errors.Join(err, w.uncordonEnded(ctx))}
}
