package appliance

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/lifecycle"
)

func clusterOfTest() joining.Cluster {
	ranges := []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}
	return joining.Cluster{ClusterCIDRs: ranges, ServiceCIDRs: ranges, ClusterDomain: "cluster.local"}
}

// TestWait: the waiting lasts as long as there is progress, and no longer.
func TestWait(t *testing.T) {
	const patience = 2 * time.Minute
	components := func(states ...lifecycle.State) (r control.Report) {
		r.PID, r.Node = 7, "n1"
		for i, s := range states {
			r.Components = append(r.Components, lifecycle.Status{Name: string(rune('a' + i)), State: s})
		}
		return r
	}
	ready, waiting, starting := lifecycle.Ready, lifecycle.Waiting, lifecycle.Starting
	down := func(time.Duration) (control.Report, error) { return control.Report{}, control.ErrNotRunning }
	for name, test := range map[string]struct {
		report  func(since time.Duration) (control.Report, error)
		service func(since time.Duration) ServiceState
		node    func(since time.Duration) (bool, string, error)
		before  int
		took    time.Duration // to within two seconds
		err     error
		text    string
		lasting string // the component whose problem is told at the end
	}{
		"ready at once": {report: func(time.Duration) (control.Report, error) { return components(ready, ready), nil }},
		"slow, but with progress": {report: func(since time.Duration) (control.Report, error) {
			switch {
			case since < 100*time.Second:
				return down(since)
			case since < 200*time.Second:
				return components(starting, waiting), nil
			case since < 300*time.Second:
				return components(ready, starting), nil
			}
			return components(ready, ready), nil
		}, took: 300 * time.Second},
		"stuck": {report: func(time.Duration) (control.Report, error) {
			r := components(waiting, starting)
			r.Components[1].Error = "the clock shows 1970"
			return r, nil
		}, took: patience, err: ErrStuck, text: "kedge is not ready: nothing has changed for 2m0s while waiting for b (0 of 2 components ready): the clock shows 1970"},
		"a problem that lasts": {report: func(time.Duration) (control.Report, error) {
			r := components(ready, ready)
			r.Components[1].Error = "a firewall is in the way of pods"
			return r, nil
		}, node: func(since time.Duration) (bool, string, error) { return since > 30*time.Second, "", nil }, took: 30*time.Second + lastingAfter, lasting: "b"},
		"a problem at the start": {report: func(since time.Duration) (control.Report, error) {
			r := components(ready, ready)
			if since < 10*time.Second {
				r.Components[1].Error = "its check has not answered"
			}
			return r, nil
		}, took: 10 * time.Second},
		"crashing again and again": {report: func(since time.Duration) (control.Report, error) {
			if int(since.Seconds())%10 < 5 {
				return down(since)
			}
			r := components(starting, waiting)
			r.PID = 1000 + int(since.Seconds())/10
			return r, nil
		}, took: patience + 5*time.Second, err: ErrStuck},
		"exit code for a permanent error": {report: down, service: func(since time.Duration) ServiceState {
			return ServiceState{Active: since < 10*time.Second, Failed: since >= 10*time.Second, Code: 78}
		}, took: 13 * time.Second, err: ErrEnded, text: "exit code 78"},
		"a restart has a moment without a process": {report: func(since time.Duration) (control.Report, error) {
			if since < 5*time.Second {
				return down(since)
			}
			return components(ready), nil
		}, service: func(since time.Duration) ServiceState { return ServiceState{Active: since > 2*time.Second} }, took: 5 * time.Second},
		"the process before the restart": {report: func(since time.Duration) (control.Report, error) {
			r := components(ready)
			if since >= 4*time.Second {
				r.PID = 8
			}
			return r, nil
		}, before: 7, took: 4 * time.Second},
		"node not Ready": {report: func(time.Duration) (control.Report, error) { return components(ready), nil }, node: func(since time.Duration) (bool, string, error) {
			return since > 30*time.Second, "container runtime is down", nil
		}, took: 30 * time.Second},
		"node never Ready": {report: func(time.Duration) (control.Report, error) { return components(ready), nil }, node: func(time.Duration) (bool, string, error) {
			return false, "", errors.New("forbidden")
		}, took: patience, err: ErrStuck, text: "while waiting for node n1 to become Ready: forbidden"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				w := Waiter{
					Report:   func(context.Context) (control.Report, error) { return test.report(time.Since(begin)) },
					Service:  func(context.Context) (ServiceState, error) { return ServiceState{Active: true}, nil },
					Show:     func(Progress, bool) {},
					Patience: patience, Before: test.before,
				}
				lasting := ""
				w.Problems = func(of []lifecycle.Status) {
					for _, c := range of {
						lasting += c.Name
					}
				}
				if test.service != nil {
					w.Service = func(context.Context) (ServiceState, error) { return test.service(time.Since(begin)), nil }
				}
				if test.node != nil {
					w.Node = func(context.Context, string) (bool, string, error) { return test.node(time.Since(begin)) }
				}
				// Without an end, a waiting that never gives up would not fail but hang.
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				err := w.Wait(ctx)
				if took := time.Since(begin); (took - test.took).Abs() > 2*time.Second {
					t.Errorf("took %s, want %s", took, test.took)
				}
				if lasting != test.lasting {
					t.Errorf("problems of %q are told, want %q", lasting, test.lasting)
				}
				if !errors.Is(err, test.err) || err != nil && !strings.Contains(err.Error(), test.text) {
					t.Errorf("%v", err)
				}
				if test.text == "exit code 78" && errorkind.ExitCode(err) != errorkind.ExitConfig {
					t.Errorf("exit code %d", errorkind.ExitCode(err))
				}
			})
		})
	}
}

func TestWaitIsInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		w := Waiter{
			Report:  func(context.Context) (control.Report, error) { return control.Report{}, control.ErrNotRunning },
			Service: func(context.Context) (ServiceState, error) { return ServiceState{Active: true}, nil },
			Show:    func(Progress, bool) {}, Patience: time.Hour,
		}
		if err := w.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v", err)
		}
	})
}

func TestLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		err := limited(t.Context(), time.Minute, "remove /x", func(context.Context) error { <-hang; return nil })
		if err == nil || !strings.Contains(err.Error(), "remove /x: no end within 1m0s") {
			t.Errorf("%v", err)
		}
		close(hang)
	})
}
