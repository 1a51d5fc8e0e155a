package harness

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// Ledger writes through servers until stopped, and remembers what was acknowledged.
type Ledger struct {
	stop, done chan struct{}
	written    []string
	longest    time.Duration // between two acknowledged writes
}

// KeepWriting starts a client of the given servers that goes to the next one when a
// request fails, as clients do that know several.
func KeepWriting(t *testing.T, ns string, servers ...*Node) *Ledger {
	t.Helper()
	l := &Ledger{stop: make(chan struct{}), done: make(chan struct{})}
	var clients []kubernetes.Interface
	for _, s := range servers {
		clients = append(clients, s.Client)
	}
	go func() {
		defer close(l.done)
		last := time.Now()
		series := time.Now().UnixNano() // a ledger has names of its own
		use := 0                        // goes to the next when one fails, and stays
		for i := 0; ; i++ {
			name := fmt.Sprintf("entry-%d-%d", series, i)
			for ; ; use++ {
				select {
				case <-l.stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				_, err := clients[use%len(clients)].CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
				cancel()
				if err == nil || strings.Contains(err.Error(), "already exists") {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			l.written = append(l.written, name)
			l.longest, last = max(l.longest, time.Since(last)), time.Now()
			time.Sleep(10 * time.Millisecond)
		}
	}()
	return l
}

// Check stops the writing and makes sure that every acknowledged write is there.
func (l *Ledger) Check(t *testing.T, what, ns string, at *Node) {
	t.Helper()
	close(l.stop)
	<-l.done
	var list *corev1.ConfigMapList
	Eventually(t, 10*time.Second, func() (err error) { // a server that came back may be without a leader once more
		list, err = at.Client.CoreV1().ConfigMaps(ns).List(context.Background(), metav1.ListOptions{})
		return err
	})
	there := map[string]bool{}
	for _, c := range list.Items {
		there[c.Name] = true
	}
	lost := slices.DeleteFunc(slices.Clone(l.written), func(name string) bool { return there[name] })
	if len(lost) > 0 || len(l.written) == 0 {
		t.Errorf("%s: of %d acknowledged writes these are lost: %v", what, len(l.written), lost)
	}
	t.Logf("%s: %d writes, the longest pause between two was %s", what, len(l.written), l.longest.Round(time.Millisecond))
}
