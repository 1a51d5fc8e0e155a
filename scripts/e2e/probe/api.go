package main

import (
	"crypto/tls"
	"encoding/json"
	"net/http"
)

// serveAPI is the least that the API server takes for an extension of its API:
// discovery of one resource, and its list. The list's one object says on whose
// behalf the aggregator asks, and by which certificate it proved to be it.
func serveAPI(addr, group, cert, key string) error {
	type object = map[string]any
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	version := group + "/v1"
	mux := http.NewServeMux()
	mux.HandleFunc("/apis/"+version, func(w http.ResponseWriter, _ *http.Request) {
		answer(w, object{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": []object{
			{"name": "callers", "singularName": "caller", "namespaced": false, "kind": "Caller", "verbs": []string{"list", "get"}},
		}})
	})
	mux.HandleFunc("/apis/"+version+"/callers", func(w http.ResponseWriter, r *http.Request) {
		by := ""
		if len(r.TLS.PeerCertificates) > 0 {
			by = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		answer(w, object{"kind": "CallerList", "apiVersion": version, "metadata": object{}, "items": []object{{
			"kind": "Caller", "apiVersion": version, "metadata": object{"name": "you"},
			"user": r.Header.Get("X-Remote-User"), "groups": r.Header.Values("X-Remote-Group"), "by": by,
		}}})
	})
	server := http.Server{Addr: addr, Handler: mux, TLSConfig: &tls.Config{ClientAuth: tls.RequestClientCert}}
	return server.ListenAndServeTLS(cert, key)
}
