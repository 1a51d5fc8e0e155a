package remote

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/appliance"
	"kedge/appliance/release"
)

// Files are the files of a release for one architecture.
type Files struct {
	Dir  string // has the executable, under its name in a release, and the list and the signature if there are any
	Hash string // of the executable
}

// Rollout upgrades the nodes of a cluster: the servers one by one, then the agents. It stops at the first node that goes
// back. Nodes that have the executable already are left alone, so that a rollout that was stopped is resumed by another.
type Rollout struct {
	Own string // the name of this server's node, which is upgraded first
	// OwnLast makes it the last of the servers. It is for a rollout that runs in the server, and ends with it.
	OwnLast bool
	Targets []Target
	Files   map[string]Files // by architecture
	Begin   Begin
	// Parallel is how many agents are upgraded at a time.
	Parallel int
	// OwnInstalled returns the hash of this server's executable, and UpgradeOwn upgrades it. Without them this server's node is
	// asked through Dial, as the others are.
	OwnInstalled func() (string, error)
	UpgradeOwn   func(context.Context) error
	// Dial connects to the answers of a node.
	Dial func(ctx context.Context, node string) (net.Conn, error)
	// Before and After are called around the upgrade of each node; nil for nothing. After is called too if Before has failed,
	// which may have done a part of its work, and is repeated while the API is away.
	Before, After func(ctx context.Context, node string) error
	// Begun reports whether an earlier rollout has begun the upgrade of a node, and which upgrade of the node was the last before
	// it ([Result.Last]). Such a node's upgrade is waited for, and Before is not called again; nil for none.
	Begun func(node string) (last string, begun bool)
	// Progress is told of each node whose upgrade begins, and of its end; nil for nothing. It is called from several goroutines.
	Progress func(Result)
	Say      func(text string)

	// patience is how long a node may be out of reach, in tests; 0 for the usual times.
	patience time.Duration
}

// Outcome is what a rollout has done with a node.
type Outcome string

// The outcomes of nodes.
const (
	Upgrading Outcome = "upgrading" // it has not ended
	Done      Outcome = "upgraded"
	Had       Outcome = "has the version already"
	Undone    Outcome = "went back"
	Failed    Outcome = "failed"
	Untouched Outcome = "untouched"
)

// Result is what a rollout has done with a node, and why.
type Result struct {
	Node    string
	Outcome Outcome
	Reason  string
	Last    string // the upgrade of the node before this one, if that is known
}

// Run upgrades the nodes. It returns a result for each target, in the order of the rollout, and an error if not all have
// the version.
func (r Rollout) Run(ctx context.Context) ([]Result, error) {
	order := r.order()
	results := make([]Result, len(order))
	for i, t := range order {
		results[i] = Result{Node: t.Name, Outcome: Untouched}
		if _, found := r.Files[t.Arch]; !found {
			return results[:i+1], fmt.Errorf("node %s is %s, for which there is no executable; give --version or --url, whose releases have all architectures. Nothing was changed", t.Name, t.Arch)
		}
	}
	one := func(i int) error {
		var err error
		results[i], err = r.upgrade(ctx, order[i])
		return err
	}
	agents := len(order)
	for i, t := range order {
		if !t.Server {
			agents = i
			break
		}
		if err := one(i); err != nil {
			return results, stopped(order[i], err)
		}
	}
	return results, r.agents(order, agents, one)
}

// agents upgrades the agents from an index on, some at a time.
func (r Rollout) agents(order []Target, from int, one func(i int) error) error {
	var mu sync.Mutex
	var first error
	next := from
	var all sync.WaitGroup
	for range max(1, r.Parallel) {
		all.Go(func() {
			for {
				mu.Lock()
				i := next
				next++
				end := first != nil || i >= len(order)
				mu.Unlock()
				if end {
					return
				}
				if err := one(i); err != nil {
					mu.Lock()
					first = errors.Join(first, stopped(order[i], err))
					mu.Unlock()
				}
			}
		})
	}
	all.Wait()
	return first
}

func stopped(t Target, err error) error {
	return fmt.Errorf("the upgrade stopped at node %s: %w", t.Name, err)
}

// order returns the targets in the order of the rollout.
func (r Rollout) order() []Target {
	rank := func(t Target) int {
		switch {
		case t.Name == r.Own && r.OwnLast:
			return 2
		case t.Name == r.Own:
			return 0
		case t.Server:
			return 1
		}
		return 3
	}
	order := slices.Clone(r.Targets)
	slices.SortStableFunc(order, func(a, b Target) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return strings.Compare(a.Name, b.Name)
	})
	return order
}

// upgrade upgrades one node, and waits for the end.
func (r Rollout) upgrade(ctx context.Context, t Target) (result Result, err error) {
	defer func() {
		if r.Progress != nil {
			r.Progress(result)
		}
	}()
	last, outcome := "", Untouched
	fail := func(err error) (Result, error) { return Result{t.Name, outcome, err.Error(), last}, err }
	files := r.Files[t.Arch]
	c := Client{Dial: func(ctx context.Context) (net.Conn, error) { return r.Dial(ctx, t.Name) }}
	hash, err := r.installed(ctx, t, c)
	if err != nil {
		return fail(err)
	}
	begun, own := false, t.Name == r.Own && r.UpgradeOwn != nil
	if !own {
		if last, begun, err = r.before(ctx, t, c, files); err != nil {
			return fail(err)
		}
	}
	if hash == files.Hash && !begun { // what is on trial is in its place already, where the executable of before had no boot guard
		r.Say(t.Name + ": " + string(Had))
		return Result{Node: t.Name, Outcome: Had}, nil
	}
	r.Say(t.Name + ": upgrading")
	if r.Before != nil && !begun {
		if err := r.Before(ctx, t.Name); err != nil {
			return fail(errors.Join(err, r.after(ctx, t)))
		}
	}
	if r.Progress != nil {
		r.Progress(Result{Node: t.Name, Outcome: Upgrading, Last: last})
	}
	switch outcome = Failed; {
	case own:
		err = r.UpgradeOwn(ctx)
	case begun:
		outcome, err = r.await(ctx, c, last)
	default:
		outcome, err = r.through(ctx, t, c, files, last)
	}
	if err = errors.Join(err, r.after(ctx, t)); err != nil {
		return fail(err)
	}
	r.Say(t.Name + ": " + string(Done))
	return Result{Node: t.Name, Outcome: Done, Last: last}, nil
}

// after calls After, also for a rollout that is interrupted.
func (r Rollout) after(ctx context.Context, t Target) error {
	if r.After == nil {
		return nil
	}
	ctx = context.WithoutCancel(ctx)
	return r.retry(ctx, findPatience, func() error { return r.After(ctx, t.Name) })
}

func (r Rollout) installed(ctx context.Context, t Target, c Client) (string, error) {
	if t.Name == r.Own && r.OwnInstalled != nil {
		return r.OwnInstalled()
	}
	var i Installed
	err := r.retry(ctx, findPatience, func() (err error) {
		i, err = c.Installed(ctx)
		return err
	})
	return i.Hash, err
}

// before returns the last upgrade of a node before that of the rollout, and whether an earlier rollout has begun the latter.
func (r Rollout) before(ctx context.Context, t Target, c Client, files Files) (last string, begun bool, err error) {
	s, err := c.Upgrades(ctx)
	if err != nil {
		return "", false, err
	}
	if r.Begun != nil {
		if last, begun := r.Begun(t.Name); begun {
			o, ended := upgradeAfter(s, last)
			if s.Trial != nil && s.Trial.To.Hash == files.Hash || s.Trial == nil && ended && o.To.Hash == files.Hash {
				return last, true, nil
			}
		}
	}
	if s.Trial != nil {
		return "", false, fmt.Errorf("%w there", appliance.ErrOnTrial)
	}
	if n := len(s.History); n > 0 {
		last = s.History[n-1].ID
	}
	return last, false, nil
}

// through upgrades another node. last is the last upgrade of the node.
func (r Rollout) through(ctx context.Context, t Target, c Client, files Files, last string) (Outcome, error) {
	for _, name := range []string{release.ListName, release.SignatureName, release.VersionName, release.Executable(t.Arch)} {
		path := filepath.Join(files.Dir, name)
		if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) && name != release.Executable(t.Arch) {
			continue
		}
		if err := c.Send(ctx, path); err != nil {
			return Untouched, fmt.Errorf("send %s: %w", name, err)
		}
	}
	if err := c.Begin(ctx, r.Begin); err != nil {
		return Untouched, err
	}
	return r.await(ctx, c, last)
}

// await waits for the end of a node's upgrade. last is the upgrade before it.
func (r Rollout) await(ctx context.Context, c Client, last string) (Outcome, error) {
	for {
		var s appliance.UpgradeStatus
		err := r.retry(ctx, restartPatience, func() (err error) {
			s, err = c.Upgrades(ctx)
			return err
		})
		if err != nil {
			return Failed, fmt.Errorf("the upgrade has begun, and its result is not known: %w", err)
		}
		if s.Trial == nil {
			return resultAfter(s, last)
		}
		if err := appliance.Sleep(ctx, time.Second); err != nil {
			return Failed, err
		}
	}
}

// upgradeAfter returns the latest upgrade of a node, unless that is last.
func upgradeAfter(s appliance.UpgradeStatus, last string) (o appliance.Outcome, found bool) {
	n := len(s.History)
	if n == 0 || s.History[n-1].ID == last {
		return o, false
	}
	return s.History[n-1], true
}

// resultAfter returns the result of the latest upgrade of a node, which must not be last.
func resultAfter(s appliance.UpgradeStatus, last string) (Outcome, error) {
	o, found := upgradeAfter(s, last)
	switch {
	case !found:
		return Failed, errors.New("the upgrade has ended without a result")
	case o.Result != appliance.Upgraded:
		return Undone, fmt.Errorf("it went back to %s, because %s", o.From, printable(o.Reason))
	}
	return Done, nil
}

// How long a node may be out of reach.
const (
	findPatience    = time.Minute     // before its upgrade: this server may have restarted, and nodes connect again
	restartPatience = 5 * time.Minute // during its upgrade
)

// oldAfter is how many attempts in sequence must say that a node is too old. A node whose kedge ends says so too.
const oldAfter = 3

// retry calls f until it succeeds, for as long as a node may be out of reach.
func (r Rollout) retry(ctx context.Context, patience time.Duration, f func() error) error {
	if r.patience != 0 {
		patience = r.patience
	}
	old := 0
	for begin := time.Now(); ; {
		err := f()
		if errors.Is(err, errors.ErrUnsupported) {
			old++
		} else {
			old = 0
		}
		if err == nil || old == oldAfter || time.Since(begin) > patience {
			return err
		}
		if err := appliance.Sleep(ctx, time.Second); err != nil {
			return err
		}
	}
}
