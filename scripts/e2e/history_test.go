package e2e

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// history is what clients of several servers have asked the API and been told, and when;
// porcupine decides whether one store could have answered so. Each key is an object of
// its own that is overwritten, read alone, and read in a list of all, which the API
// servers answer from their caches.
type history struct {
	ns    string
	began time.Time
	stop  chan struct{}
	wg    sync.WaitGroup

	mu     sync.Mutex
	ops    []porcupine.Operation
	failed int
}

type operation struct {
	write      bool
	key, value string // the value is what is written
}

// register is one object that is written and read as a whole.
var register = porcupine.Model{
	Partition: func(all []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		for _, op := range all {
			key := op.Input.(operation).key
			byKey[key] = append(byKey[key], op)
		}
		var out [][]porcupine.Operation
		for _, ops := range byKey {
			out = append(out, ops)
		}
		return out
	},
	Init: func() any { return "" },
	Step: func(state, input, output any) (bool, any) {
		if in := input.(operation); in.write {
			return true, in.value
		}
		return output == state, state
	},
}

const historyKeys = 4

// record makes the objects in a namespace of the test, and starts clients of all servers.
func record(t *testing.T, ns string, servers ...*node) *history {
	t.Helper()
	h := &history{ns: ns, began: time.Now(), stop: make(chan struct{})}
	for key := range historyKeys {
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: historyKey(key), Labels: map[string]string{"history": "yes"}}, Data: map[string]string{"value": ""}}
		if _, err := servers[0].client.CoreV1().ConfigMaps(ns).Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for client := range 2 * len(servers) {
		s := servers[client%len(servers)]
		h.wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-h.stop:
					return
				default:
				}
				h.once(client, n, s.client)
				time.Sleep(time.Duration(20+rand.IntN(60)) * time.Millisecond)
			}
		})
	}
	return h
}

func historyKey(i int) string { return fmt.Sprint("history-", i) }

// once asks one thing. Nothing is asked twice by itself: what came of the first time
// would not be known.
func (h *history) once(client, n int, c kubernetes.Interface) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	in := operation{key: historyKey(rand.IntN(historyKeys))}
	op := porcupine.Operation{ClientId: client, Call: time.Since(h.began).Nanoseconds(), Output: ""}
	api := c.CoreV1().RESTClient()
	var err error
	switch rand.IntN(3) {
	case 0:
		in.write, in.value = true, fmt.Sprintf("%d-%d", client, n)
		object := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: in.key, Labels: map[string]string{"history": "yes"}}, Data: map[string]string{"value": in.value}}
		err = api.Put().MaxRetries(0).Namespace(h.ns).Resource("configmaps").Name(in.key).Body(object).Do(ctx).Error()
	case 1:
		var got corev1.ConfigMap
		err = api.Get().MaxRetries(0).Namespace(h.ns).Resource("configmaps").Name(in.key).Do(ctx).Into(&got)
		op.Output = got.Data["value"]
	default:
		var all corev1.ConfigMapList
		err = api.Get().MaxRetries(0).Namespace(h.ns).Resource("configmaps").Param("labelSelector", "history=yes").Do(ctx).Into(&all)
		for _, got := range all.Items {
			if got.Name == in.key {
				op.Output = got.Data["value"]
			}
		}
	}
	op.Input, op.Return = in, time.Since(h.began).Nanoseconds()

	h.mu.Lock()
	defer h.mu.Unlock()
	if err != nil {
		h.failed++
		if !in.write || apierrors.IsTooManyRequests(err) {
			return // nothing was read, or nothing done
		}
		op.Return = math.MaxInt64 // it may still happen, at any time
	}
	h.ops = append(h.ops, op)
}

// end stops the clients and judges.
func (h *history) end(t *testing.T) {
	t.Helper()
	close(h.stop)
	h.wg.Wait()
	switch porcupine.CheckOperationsTimeout(register, h.ops, time.Minute) {
	case porcupine.Illegal:
		t.Error("the history of the API is not linearizable")
	case porcupine.Unknown:
		t.Error("the history of the API could not be judged in time")
	}
	if len(h.ops) < 100 {
		t.Errorf("the history has only %d operations", len(h.ops))
	}
	t.Logf("the history of the API has %d operations, and %d that failed", len(h.ops), h.failed)
}

// A history that no single store could have given must be found out.
func TestHistoryIsJudged(t *testing.T) {
	write := operation{write: true, key: "k", value: "1"}
	ops := []porcupine.Operation{
		{Input: write, Call: 0, Return: 10},
		{Input: operation{key: "k"}, Output: "", Call: 20, Return: 30},
	}
	if porcupine.CheckOperations(register, ops) {
		t.Error("a stale read was taken for linearizable")
	}
}
