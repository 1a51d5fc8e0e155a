package faults

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestClusterFigures measures, and fails only when something does not work. It runs when
// asked to: make bench-cluster.
func TestClusterFigures(t *testing.T) {
	harness.OnlyMeasures(t, "make bench-cluster")
	f := newFaults(t)
	var joins []time.Duration
	for range 5 {
		a := f.NewAgent(t, "--token="+f.NewToken(t))
		begin := time.Now()
		if err := a.Launch(); err != nil {
			t.Fatal(err)
		}
		for f.NodeIsReady(a.Name) != nil && time.Since(begin) < time.Minute {
			time.Sleep(10 * time.Millisecond)
		}
		joins = append(joins, time.Since(begin))
		a.Stop(t, syscall.SIGTERM, 20*time.Second)
		f.Kubectl(t, "delete", "node", a.Name)
	}
	t.Logf("from the command to the node of an agent being Ready: %s", harness.Figures(joins))

	kills := 20
	if n, err := strconv.Atoi(os.Getenv("KEDGE_BENCH_KILLS")); err == nil {
		kills = n
	}
	var writes, scheduled, agent, service, ready []time.Duration
	for kill := range kills {
		s, rest := f.leader(t)
		gap := f.gap(t, rest...)
		inPod := longest(t, func(ctx context.Context) error {
			_, err := f.inPod.CoreV1().Namespaces().Get(ctx, "default", metav1.GetOptions{})
			return err
		})
		time.Sleep(500 * time.Millisecond)
		begin := time.Now()
		if err := s.Signal(syscall.SIGKILL, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		name := fmt.Sprint("killed-", kill)
		f.made(t, rest, name)
		for {
			if p, err := rest[0].Pod(f.ns, name); err == nil && p.Spec.NodeName != "" {
				break
			}
			if time.Since(begin) > time.Minute {
				t.Fatal("a pod is not scheduled")
			}
			time.Sleep(10 * time.Millisecond)
		}
		scheduled = append(scheduled, time.Since(begin))
		f.elsewhere(t, s, begin)
		agent = append(agent, time.Since(begin))
		rest[0].AwaitEndpoints(t, rest...)
		time.Sleep(500 * time.Millisecond)
		writes = append(writes, gap())
		service = append(service, inPod())
		begin = time.Now()
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		ready = append(ready, time.Since(begin))
		f.voting(t, s)
		f.AwaitEndpoints(t, f.all...)
		rest[0].Kubectl(t, "delete", "pod", "-n", f.ns, name, "--grace-period=0", "--force", "--wait=false")
	}
	t.Logf("the leader is killed: longest time without a write through the others: %s", harness.Figures(writes))
	t.Logf("the leader is killed: the same for a read by the service kubernetes from a pod: %s", harness.Figures(service))
	t.Logf("the leader is killed: until a pod made meanwhile is scheduled: %s", harness.Figures(scheduled))
	t.Logf("the leader is killed: until the agent uses another server: %s", harness.Figures(agent))
	t.Logf("from the command to a killed server being ready: %s", harness.Figures(ready))

	var rolling, stops []time.Duration
	for range 2 {
		for _, s := range f.all {
			gap := f.gap(t, append(f.others(s), s)...)
			time.Sleep(500 * time.Millisecond)
			begin := time.Now()
			s.Stop(t, syscall.SIGTERM, 20*time.Second)
			stops = append(stops, time.Since(begin))
			if err := s.Start(); err != nil {
				t.Fatal(err)
			}
			f.voting(t, s)
			rolling = append(rolling, gap())
		}
	}
	t.Logf("a server is restarted: longest time without a write through all: %s", harness.Figures(rolling))
	t.Logf("a server stops within %s", harness.Figures(stops))

	// Leadership goes around while the processes stay.
	t.Logf("before the changes of leadership:\n%s", f.sizes(t))
	for range 20 {
		s, _ := f.leader(t)
		if err := s.Cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		time.Sleep(4 * time.Second)
		if err := s.Cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		f.voting(t, s)
	}
	time.Sleep(10 * time.Second)
	t.Logf("after 20 of them:\n%s", f.sizes(t))
}

// gap starts to write through servers, to the next when one does not answer within a
// second, and returns what tells the longest time between two writes.
func (f *faults) gap(t *testing.T, through ...*harness.Node) func() time.Duration {
	t.Helper()
	name := fmt.Sprint("gap-", time.Now().UnixNano())
	if _, err := through[0].Client.CoreV1().ConfigMaps(f.ns).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	tries := 0
	return longest(t, func(ctx context.Context) error {
		tries++
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: map[string]string{"n": fmt.Sprint(tries)}}
		_, err := through[tries%len(through)].Client.CoreV1().ConfigMaps(f.ns).Update(ctx, object, metav1.UpdateOptions{})
		return err
	})
}

// longest repeats do, and returns what ends that and tells the longest time between two
// successes.
func longest(t *testing.T, do func(context.Context) error) func() time.Duration {
	t.Helper()
	stop, done := make(chan struct{}), make(chan time.Duration)
	go func() {
		var most time.Duration
		for last := time.Now(); ; time.Sleep(5 * time.Millisecond) {
			select {
			case <-stop:
				done <- most
				return
			default:
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			err := do(ctx)
			cancel()
			if err == nil {
				most, last = max(most, time.Since(last)), time.Now()
			}
		}
	}()
	return func() time.Duration {
		close(stop)
		return <-done
	}
}

// made makes a pod through whichever of the servers takes it.
func (f *faults) made(t *testing.T, through []*harness.Node, name string) {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "main", Image: harness.Busybox, Command: []string{"sleep", "36000"}}}}}
	for try := 0; ; try++ {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, err := through[try%len(through)].Client.CoreV1().Pods(f.ns).Create(ctx, pod, metav1.CreateOptions{})
		cancel()
		if err == nil || strings.Contains(err.Error(), "already exists") {
			return
		}
		if try > 100 {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// sizes are the servers' anonymous memory and goroutines.
func (f *faults) sizes(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, s := range f.all {
		goroutines, anonymous, err := memoryOf(s)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s: %s, %s\n", s.Name, goroutines, anonymous)
	}
	return b.String()
}

func memoryOf(n *harness.Node) (goroutines, anonymous string, err error) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, Dial: func(string, string) (net.Conn, error) {
		return net.Dial("unix", filepath.Join(n.RunDir(), "kedge.sock"))
	}}}
	resp, err := c.Get("http://kedge/debug/pprof/goroutine?debug=1")
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	line := make([]byte, 64)
	count, _ := resp.Body.Read(line)
	goroutines, _, _ = strings.Cut(string(line[:count]), "\n")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.Cmd.Process.Pid))
	for l := range strings.Lines(string(status)) {
		if strings.HasPrefix(l, "RssAnon:") {
			anonymous = strings.Join(strings.Fields(l), " ")
		}
	}
	return goroutines, anonymous, err
}
