package metricsplit

import (
	"io"
	"net/http/httptest"
	"strings"
	"testing"

	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
)

func TestSplit(t *testing.T) {
	before := metrics.NewCounter(&metrics.CounterOpts{Name: "kubelet_before_total"})
	after := metrics.NewCounter(&metrics.CounterOpts{Name: "kubelet_after_total"})
	api := metrics.NewCounter(&metrics.CounterOpts{Name: "apiserver_before_total"})
	legacyregistry.MustRegister(before, api)
	before.Inc()
	api.Inc()
	handler := legacyregistry.Handler() // made before, as the kubelet may
	if _, err := Split(); err != nil {
		t.Fatal(err)
	}
	others, err := Split()
	if err != nil {
		t.Fatal(err)
	}
	legacyregistry.MustRegister(after)
	after.Inc()

	w := httptest.NewRecorder()
	handler.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	body, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	text := string(body)
	if !strings.Contains(text, "kubelet_before_total 1") || !strings.Contains(text, "kubelet_after_total 1") {
		t.Errorf("the kubelet's endpoint lacks its own:\n%s", text)
	}
	if strings.Contains(text, "apiserver_") || strings.Contains(text, "process_") {
		t.Errorf("the kubelet's endpoint has others:\n%s", text)
	}
	rest, err := others.Gather()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, f := range rest {
		names[f.GetName()] = true
		if Kubelets(f.GetName()) {
			t.Errorf("%s is at both endpoints", f.GetName())
		}
	}
	if !names["apiserver_before_total"] || !names["go_goroutines"] {
		t.Errorf("the API's endpoint lacks its own: %v", names)
	}
}
