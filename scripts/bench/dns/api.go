package main

import (
	"encoding/json"
	"net/http"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// objects are the objects of the API server. They do not change.
type objects struct {
	services   []corev1.Service
	slices     []discoveryv1.EndpointSlice
	namespaces []corev1.Namespace
}

// api is a minimal API server for a resolver: lists, and watches without events.
func api(o objects) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /api/v1/services", list("v1", "Service", o.services))
	mux.Handle("GET /api/v1/namespaces", list("v1", "Namespace", o.namespaces))
	mux.Handle("GET /api/v1/nodes", list("v1", "Node", []corev1.Node{})) // for kedge's names of nodes; CoreDNS has none
	mux.Handle("GET /apis/discovery.k8s.io/v1/endpointslices", list("discovery.k8s.io/v1", "EndpointSlice", o.slices))
	mux.Handle("GET /api/v1/namespaces/kube-system/configmaps", list("v1", "ConfigMap", []corev1.ConfigMap{}))
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"major": "1", "minor": "37", "gitVersion": "v1.37.1"}`))
	})
	mux.HandleFunc("GET /apis/discovery.k8s.io/v1", func(w http.ResponseWriter, _ *http.Request) {
		write(w, metav1.APIResourceList{GroupVersion: "discovery.k8s.io/v1", APIResources: []metav1.APIResource{
			{Name: "endpointslices", Namespaced: true, Kind: "EndpointSlice", Verbs: metav1.Verbs{"get", "list", "watch"}}}})
	})
	return mux
}

func write(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a client that has disconnected is no error
}

// list answers requests for a list of objects and watches of it.
func list[T any](version, kind string, items []T) http.Handler {
	typed := make([]json.RawMessage, len(items))
	for i := range items {
		data, err := json.Marshal(items[i])
		if err != nil {
			panic(err)
		}
		typed[i] = append([]byte(`{"apiVersion":"`+version+`","kind":"`+kind+`",`), data[1:]...)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("watch") == "" {
			write(w, map[string]any{
				"apiVersion": version, "kind": kind + "List", "metadata": map[string]string{"resourceVersion": "1"}, "items": typed,
			})
			return
		}
		w.Header().Set("Content-Type", "application/json")
		out := json.NewEncoder(w)
		if strings.EqualFold(q.Get("sendInitialEvents"), "true") {
			for _, o := range typed {
				_ = out.Encode(map[string]any{"type": "ADDED", "object": o})
			}
			_ = out.Encode(map[string]any{"type": "BOOKMARK", "object": map[string]any{
				"apiVersion": version, "kind": kind,
				"metadata": map[string]any{"resourceVersion": "1", "annotations": map[string]string{metav1.InitialEventsAnnotationKey: "true"}},
			}})
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
}
