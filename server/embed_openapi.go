package server

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/emicklei/go-restful/v3"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/mux"
	"k8s.io/apiserver/pkg/server/routes"
	"k8s.io/component-base/version"
	"k8s.io/kube-openapi/pkg/builder"
	"k8s.io/kube-openapi/pkg/cached"
	openapicommon "k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/common/restfuladapter"
	"k8s.io/kube-openapi/pkg/handler"
	"k8s.io/kube-openapi/pkg/handler3"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"

	"kedge/server/expiring"
)

// keepOpenAPI is how long an OpenAPI v3 document is kept after the last request for it.
const keepOpenAPI = time.Minute

// lateOpenAPI removes the OpenAPI documents of Kubernetes' own types from the start, and returns a function
// that installs handlers which build them on request, to be called when the server chain is prepared. The v2
// document is kept after that, because few clients request it; v3 documents are kept for a minute. They are a
// third of the idle heap; see docs/performance.md. The small documents of custom resources and of the
// aggregator are built by upstream.
func lateOpenAPI(config *app.Config) (install func(aggregator *genericapiserver.GenericAPIServer) error) {
	generic := config.KubeAPIs.ControlPlane.Generic
	generic.SkipOpenAPIInstallation = true
	nameOperations(config)
	v2, v3 := generic.OpenAPIConfig, generic.OpenAPIV3Config
	return func(aggregator *genericapiserver.GenericAPIServer) error {
		kube, ok := aggregator.NextDelegate().(*genericapiserver.GenericAPIServer)
		if !ok {
			return fmt.Errorf("the API server behind the aggregator is a %T, so /openapi cannot be added to it", aggregator.NextDelegate())
		}
		handler.NewOpenAPIServiceLazy(cached.Once(cached.Func(func() (*spec.Swagger, string, error) {
			return buildOpenAPIV2(kube, v2)
		}))).RegisterOpenAPIVersionedService("/openapi/v2", kube.Handler.NonGoRestfulMux)
		return installOpenAPIV3(kube, v3)
	}
}

// nameOperations sets the function that names operations in documents on all servers. Otherwise a builder
// creates a function that references the builder, with the schemas of all types, for as long as the
// configuration exists: for ever.
func nameOperations(config *app.Config) {
	by := func(of func(*restful.Route) (string, []string, error)) func(openapicommon.Route) (string, []string, error) {
		return func(r openapicommon.Route) (string, []string, error) {
			a, ok := r.(*restfuladapter.RouteAdapter)
			if !ok {
				return "", nil, fmt.Errorf("the route %s is a %T, not one of go-restful", r.Path(), r)
			}
			return of(a.Route)
		}
	}
	for _, c := range []*genericapiserver.Config{config.KubeAPIs.ControlPlane.Generic, &config.ApiExtensions.GenericConfig.Config, &config.Aggregator.GenericConfig.Config} {
		if v2 := c.OpenAPIConfig; v2 != nil && v2.GetOperationIDAndTagsFromRoute == nil && v2.GetOperationIDAndTags != nil {
			v2.GetOperationIDAndTagsFromRoute = by(v2.GetOperationIDAndTags)
		}
		if v3 := c.OpenAPIV3Config; v3 != nil && v3.GetOperationIDAndTagsFromRoute == nil && v3.GetOperationIDAndTags != nil {
			v3.GetOperationIDAndTagsFromRoute = by(v3.GetOperationIDAndTags)
		}
	}
}

func buildOpenAPIV2(s *genericapiserver.GenericAPIServer, c *openapicommon.Config) (doc *spec.Swagger, etag string, err error) {
	routes := restfuladapter.AdaptWebServices(s.Handler.GoRestfulContainer.RegisteredWebServices())
	if doc, err = builder.BuildOpenAPISpecFromRoutes(routes, c); err != nil {
		return nil, "", fmt.Errorf("build the OpenAPI v2 document: %w", err)
	}
	doc.Definitions = handler.PruneDefaults(doc.Definitions)
	return doc, "of this process", nil // it does not change; the merged document has its own tag
}

// installOpenAPIV3 serves the list of all groups' documents, and each document.
func installOpenAPIV3(s *genericapiserver.GenericAPIServer, c *openapicommon.OpenAPIV3Config) error {
	const root = "/openapi/v3"
	list := handler3.OpenAPIV3Discovery{Paths: map[string]handler3.OpenAPIV3DiscoveryGroupVersion{}}
	documents := openAPIV3{}
	// Documents that are requested together share the same schemas.
	full := expiring.New(keepOpenAPI, func() (*openapicommon.OpenAPIV3Config, error) { return withDefinitions(*c), nil })
	for _, ws := range s.Handler.GoRestfulContainer.RegisteredWebServices() {
		group := strings.TrimPrefix(ws.RootPath(), "/")
		d := &openAPIV3Document{hash: openAPIHash(c, ws)}
		d.url = (&url.URL{Path: root + "/" + group, RawQuery: url.Values{"hash": {d.hash}}.Encode()}).String()
		d.handler = expiring.New(keepOpenAPI, func() (http.Handler, error) {
			c, err := full.Get()
			if err != nil {
				return nil, err
			}
			only := restful.NewContainer()
			only.Add(ws)
			m := mux.NewPathRecorderMux("openapi of " + group)
			routes.OpenAPI{V3Config: c}.InstallV3(only, m)
			return m, nil
		})
		documents[root+"/"+group] = d
		list.Paths[group] = handler3.OpenAPIV3DiscoveryGroupVersion{ServerRelativeURL: d.url}
	}
	text, err := json.Marshal(list)
	if err != nil {
		return fmt.Errorf("list the OpenAPI documents: %w", err)
	}
	s.Handler.NonGoRestfulMux.HandleFunc(root, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.Write(text)
	})
	s.Handler.NonGoRestfulMux.HandlePrefix(root+"/", documents)
	return nil
}

// withDefinitions returns the configuration with the schemas of all types.
func withDefinitions(c openapicommon.OpenAPIV3Config) *openapicommon.OpenAPIV3Config {
	c.Definitions = c.GetDefinitions(func(name string) spec.Ref {
		defined, _ := c.GetDefinitionName(name)
		return spec.MustCreateRef("#/components/schemas/" + openapicommon.EscapeJsonPointer(defined))
	})
	return &c
}

// openAPIHash returns a hash for a document that is not built yet. It is equal on all servers of one version
// and configuration, and changes when the document may change.
func openAPIHash(c *openapicommon.OpenAPIV3Config, ws *restful.WebService) string {
	var list []string
	for _, r := range ws.Routes() {
		list = append(list, r.Method+" "+r.Path+" "+r.Operation)
	}
	slices.Sort(list)
	sum := sha256.New()
	fmt.Fprintln(sum, version.Get().GitVersion, version.Get().GitCommit, c.Info.Version)
	for _, r := range list {
		fmt.Fprintln(sum, r)
	}
	return fmt.Sprintf("%X", sum.Sum(nil))
}

// openAPIV3 has the documents by their paths.
type openAPIV3 map[string]*openAPIV3Document

type openAPIV3Document struct {
	hash    string
	url     string // including the hash
	handler *expiring.Value[http.Handler]
}

// ServeHTTP serves a document like handler3: clients may cache a document requested with its hash for ever, and
// are redirected from an old hash to the new one.
func (o openAPIV3) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	d, ok := o[r.URL.Path]
	if !ok {
		http.NotFound(w, r)
		return
	}
	switch r.URL.Query().Get("hash") {
	case "":
	case d.hash:
		w.Header().Set("Cache-Control", "public, immutable")
		w.Header().Set("Expires", time.Now().AddDate(1, 0, 0).UTC().Format(http.TimeFormat))
	default:
		http.Redirect(w, r, d.url, http.StatusMovedPermanently)
		return
	}
	h, err := d.handler.Get()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	plain := r.Clone(r.Context())
	plain.URL.RawQuery = "" // the handler's own hash differs
	h.ServeHTTP(w, plain)
}
