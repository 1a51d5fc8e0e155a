package servicelb

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

func start(t *testing.T, cfg Config, objects ...runtime.Object) *fake.Clientset {
	t.Helper()
	client := fake.NewClientset(objects...)
	c := newController(cfg, client, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- c.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	case <-time.After(10 * time.Second):
		t.Fatal("not ready")
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return client
}

// waitAddresses waits until a service has these addresses.
func waitAddresses(t *testing.T, client *fake.Clientset, name, want string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		s, err := client.CoreV1().Services("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got := fmt.Sprint(currentAddresses(s))
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s has %s, want %s", name, got, want)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestController(t *testing.T) {
	first := service("first", 80)
	first.UID = "1"
	client := start(t, Config{}, node("a", "192.0.2.1"), first)
	waitAddresses(t, client, "first", "[192.0.2.1]")
	services := client.CoreV1().Services("default")
	second := service("second", 80)
	second.UID = "2"
	if _, err := services.Create(t.Context(), second, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		events, err := client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if slices.ContainsFunc(events.Items, func(e corev1.Event) bool {
			return e.InvolvedObject.Name == "second" && e.Reason == reasonPort && strings.Contains(e.Message, "used by service default/first")
		}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no event: %v", events.Items)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if _, err := client.CoreV1().Nodes().Create(t.Context(), node("b", "192.0.2.2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	waitAddresses(t, client, "first", "[192.0.2.1 192.0.2.2]")
	if err := services.Delete(t.Context(), "first", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	waitAddresses(t, client, "second", "[192.0.2.1 192.0.2.2]")
}

// A cloud controller's finalizer would keep a service for ever.
func TestFinalizerOfCloudControllers(t *testing.T) {
	s := service("web", 80)
	now := metav1.Now()
	s.Finalizers, s.DeletionTimestamp = []string{cleanupFinalizer, "example.com/other"}, &now
	client := start(t, Config{}, node("a", "192.0.2.1"), s)
	deadline := time.Now().Add(10 * time.Second)
	for {
		s, err := client.CoreV1().Services("default").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if slices.Equal(s.Finalizers, []string{"example.com/other"}) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("finalizers: %v", s.Finalizers)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// What stops being a load balancer loses its addresses: the API server leaves the status.
func TestAnotherType(t *testing.T) {
	s := service("web", 80, has("192.0.2.1"))
	client := fake.NewClientset()
	c := newController(Config{}, client, slog.New(slog.DiscardHandler))
	c.recordLeft(s)
	c.recordLeft(service("gone", 80, has("192.0.2.1")))
	s.Spec.Type = corev1.ServiceTypeClusterIP
	if _, err := client.CoreV1().Services("default").Create(t.Context(), s, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := c.clearLeft(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitAddresses(t, client, "web", "[]")
	if len(c.left) != 0 {
		t.Errorf("left: %v", c.left)
	}
	c.left[types.NamespacedName{Namespace: "default", Name: "never"}] = true
	if err := c.clearLeft(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestAnotherTypeMeanwhile: the type changed while no controller ran.
func TestAnotherTypeMeanwhile(t *testing.T) {
	s := service("web", 80, has("192.0.2.1"))
	s.Spec.Type = corev1.ServiceTypeClusterIP
	client := start(t, Config{}, node("a", "192.0.2.1"), s)
	waitAddresses(t, client, "web", "[]")
}
