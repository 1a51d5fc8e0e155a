package server

import (
	"context"
	"errors"
	"fmt"

	apiextensionsscheme "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/scheme"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	k8sscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
	"k8s.io/kubernetes/pkg/controller/validatingadmissionpolicystatus"
	"k8s.io/kubernetes/pkg/generated/openapi"

	"kedge/server/expiring"
)

// policyStatus returns the controller that checks the types in validating admission policies. Upstream's
// descriptor keeps the schemas of all types for ever, an eighth of the idle heap, although most clusters have
// few policies.
func policyStatus(cc app.ControllerContext) (run func(context.Context), err error) {
	const name = names.ValidatingAdmissionPolicyStatusController
	discovery, err := cc.ClientBuilder.DiscoveryClient(name)
	if err != nil {
		return nil, fmt.Errorf("create the client of %s: %w", name, err)
	}
	client, err := cc.NewClient(name)
	if err != nil {
		return nil, fmt.Errorf("create the client of %s: %w", name, err)
	}
	c, err := validatingadmissionpolicystatus.NewController(
		cc.InformerFactory.Admissionregistration().V1().ValidatingAdmissionPolicies(),
		client.AdmissionregistrationV1().ValidatingAdmissionPolicies(),
		&validating.TypeChecker{
			SchemaResolver: schemas{
				own: expiring.New(keepOpenAPI, func() (resolver.SchemaResolver, error) {
					return resolver.NewDefinitionsSchemaResolver(openapi.GetOpenAPIDefinitions, k8sscheme.Scheme, apiextensionsscheme.Scheme), nil
				}),
				others: &resolver.ClientDiscoveryResolver{Discovery: discovery},
			},
			RestMapper: cc.RESTMapper,
		})
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", name, err)
	}
	workers := int(cc.ComponentConfig.ValidatingAdmissionPolicyStatusController.ConcurrentPolicySyncs)
	return func(ctx context.Context) { c.Run(ctx, workers) }, nil
}

// schemas finds a type's schema among Kubernetes' own types, or else requests it from the API.
type schemas struct {
	own    *expiring.Value[resolver.SchemaResolver]
	others resolver.SchemaResolver
}

func (s schemas) ResolveSchema(gvk schema.GroupVersionKind) (*spec.Schema, error) {
	own, err := s.own.Get()
	if err != nil {
		return nil, err
	}
	found, err := own.ResolveSchema(gvk)
	if errors.Is(err, resolver.ErrSchemaNotFound) {
		return s.others.ResolveSchema(gvk)
	}
	return found, err
}
