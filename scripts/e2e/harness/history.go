package harness

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"kedge/internal/test/history"
)

const historyKeys = 4

// RecordHistory makes objects in a namespace of the test, and starts clients of all servers.
// Each key is an object of its own that is overwritten, read alone, and read in a list of
// all, which the API servers answer from their caches.
func RecordHistory(t *testing.T, ns string, servers ...*Node) *history.History {
	t.Helper()
	for key := range historyKeys {
		if _, err := servers[0].Client.CoreV1().ConfigMaps(ns).Create(t.Context(), historyObject(historyKey(key), ""), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	h := history.New()
	for client := range 2 * len(servers) {
		s := servers[client%len(servers)]
		h.Client(func() time.Duration { return time.Duration(20+rand.IntN(60)) * time.Millisecond }, func(n int) {
			askOnce(h, ns, client, n, s.Client)
		})
	}
	return h
}

func historyKey(i int) string { return fmt.Sprint("history-", i) }

func historyObject(key, value string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: key, Labels: map[string]string{"history": "yes"}}, Data: map[string]string{"value": value}}
}

// askOnce asks one thing. Nothing is asked twice by itself: what came of the first time
// would not be known.
func askOnce(h *history.History, ns string, client, n int, c kubernetes.Interface) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	key, api := historyKey(rand.IntN(historyKeys)), c.CoreV1().RESTClient()
	switch rand.IntN(3) {
	case 0:
		value := fmt.Sprintf("%d-%d", client, n)
		h.Write(client, key, value, func() error {
			err := api.Put().MaxRetries(0).Namespace(ns).Resource("configmaps").Name(key).Body(historyObject(key, value)).Do(ctx).Error()
			if apierrors.IsTooManyRequests(err) {
				err = fmt.Errorf("%w: %w", history.ErrNotDone, err)
			}
			return err
		})
	case 1:
		h.Read(client, key, func() (string, error) {
			var got corev1.ConfigMap
			err := api.Get().MaxRetries(0).Namespace(ns).Resource("configmaps").Name(key).Do(ctx).Into(&got)
			return got.Data["value"], err
		})
	default:
		h.Read(client, key, func() (string, error) {
			var all corev1.ConfigMapList
			err := api.Get().MaxRetries(0).Namespace(ns).Resource("configmaps").Param("labelSelector", "history=yes").Do(ctx).Into(&all)
			for _, got := range all.Items {
				if got.Name == key {
					return got.Data["value"], err
				}
			}
			return "", err
		})
	}
}
