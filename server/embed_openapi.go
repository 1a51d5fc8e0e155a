package server

import (
	"fmt"

	"k8s.io/apiserver/pkg/server"
	"k8s.io/kube-openapi/pkg/builder"
	"k8s.io/kube-openapi/pkg/cached"
	openapicommon "k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/common/restfuladapter"
	"k8s.io/kube-openapi/pkg/handler"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

// lateOpenAPIV2 takes the v2 document of Kubernetes' own types out of the start and
// returns what puts it back in, once the server chain is prepared: made at the first
// request, and kept from then on. Few clients ask for it since they have v3. It
// costs a tenth of the start's processor time and an eighth of the idle memory; see
// docs/performance.md. The small documents of custom resources and of the aggregator
// stay as upstream makes them.
func lateOpenAPIV2(config *app.Config) (install func(aggregator *server.GenericAPIServer) error) {
	generic := config.KubeAPIs.ControlPlane.Generic
	openapi := generic.OpenAPIConfig
	generic.OpenAPIConfig = nil
	return func(aggregator *server.GenericAPIServer) error {
		kube, ok := aggregator.NextDelegate().(*server.GenericAPIServer)
		if !ok {
			return fmt.Errorf("the API server behind the aggregator is a %T, so /openapi/v2 cannot be added to it", aggregator.NextDelegate())
		}
		handler.NewOpenAPIServiceLazy(cached.Once(cached.Func(func() (*spec.Swagger, string, error) {
			return buildOpenAPIV2(kube, openapi)
		}))).RegisterOpenAPIVersionedService("/openapi/v2", kube.Handler.NonGoRestfulMux)
		return nil
	}
}

func buildOpenAPIV2(s *server.GenericAPIServer, c *openapicommon.Config) (doc *spec.Swagger, etag string, err error) {
	routes := restfuladapter.AdaptWebServices(s.Handler.GoRestfulContainer.RegisteredWebServices())
	if doc, err = builder.BuildOpenAPISpecFromRoutes(routes, c); err != nil {
		return nil, "", fmt.Errorf("build the OpenAPI v2 document: %w", err)
	}
	doc.Definitions = handler.PruneDefaults(doc.Definitions)
	return doc, "of this process", nil // it does not change; what is merged has tags of its own
}
