package server

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
	_ "unsafe" // for go:linkname

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	schedulingv1 "k8s.io/kubernetes/pkg/apis/scheduling/v1"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// ensureRBACPolicy is upstream's: it creates the roles and bindings of p that are missing
// and completes those that lack something, and reports whether all of them are right.
// TestHooksMatchUpstream of scripts/house fails when it changes.
//
//go:linkname ensureRBACPolicy k8s.io/kubernetes/pkg/registry/rbac/rest.ensureRBACPolicy
func ensureRBACPolicy(p *rbacrest.PolicyData, client kubernetes.Interface) (done bool, err error)

// bootHooks replaces two of upstream's hooks by hooks that do not wait: those that create the roles and the
// priority classes of every cluster, for which /readyz waits. Upstream's hooks wait for a second before they
// begin. It changes config, and returns a function that must be called with the server that was made from it.
func (s *APIServer) bootHooks(config *app.Config) (install func(*genericapiserver.GenericAPIServer) error) {
	hooks := map[string]func(context.Context, kubernetes.Interface) (bool, error){
		rbacrest.PostStartHookName:       ensureRoles,
		schedulingrest.PostStartHookName: ensurePriorityClasses,
	}
	disabled := config.KubeAPIs.ControlPlane.Generic.DisabledPostStartHooks
	for name := range hooks {
		if disabled.Has(name) { // like the hook for roles if the user has chosen another authorizer than RBAC
			delete(hooks, name)
		}
		disabled.Insert(name)
	}
	return func(server *genericapiserver.GenericAPIServer) error {
		for name, ensure := range hooks {
			disabled.Delete(name)
			err := server.AddPostStartHook(name, func(hook genericapiserver.PostStartHookContext) error {
				client, err := kubernetes.NewForConfig(s.deps.Loopback.Admin())
				if err != nil {
					return err
				}
				err = wait.PollUntilContextTimeout(hook.Context, 200*time.Millisecond, 30*time.Second, true, func(ctx context.Context) (bool, error) {
					return ensure(ctx, client)
				})
				if hook.Context.Err() != nil {
					return nil // the server is stopping: an error would exit the process
				}
				return err // as upstream: the server cannot work without these objects
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// ensureRoles calls ensureRBACPolicy for all roles of a cluster, in parallel parts: most of the time of the
// first boot is waiting for the disk.
func ensureRoles(ctx context.Context, client kubernetes.Interface) (done bool, err error) {
	// Roles of older clusters with other names come first.
	if done, err := ensureRBACPolicy(&rbacrest.PolicyData{
		ClusterRolesToAggregate:    bootstrappolicy.ClusterRolesToAggregate(),
		ClusterRoleBindingsToSplit: bootstrappolicy.ClusterRoleBindingsToSplit(),
	}, client); !done || err != nil {
		return done, err
	}
	parts := make([]rbacrest.PolicyData, roleParts)
	for i, r := range append(bootstrappolicy.ClusterRoles(), bootstrappolicy.ControllerRoles()...) {
		p := &parts[i%len(parts)]
		p.ClusterRoles = append(p.ClusterRoles, r)
	}
	for i, b := range append(bootstrappolicy.ClusterRoleBindings(), bootstrappolicy.ControllerRoleBindings()...) {
		p := &parts[i%len(parts)]
		p.ClusterRoleBindings = append(p.ClusterRoleBindings, b)
	}
	parts[0].Roles, parts[0].RoleBindings = bootstrappolicy.NamespaceRoles(), bootstrappolicy.NamespaceRoleBindings()
	var group sync.WaitGroup
	right, errs := make([]bool, len(parts)), make([]error, len(parts))
	for i := range parts {
		group.Go(func() { right[i], errs[i] = ensureRBACPolicy(&parts[i], client) })
	}
	group.Wait()
	return !slices.Contains(right, false), errors.Join(errs...)
}

// roleParts is the number of parallel parts for the roles and bindings, about two hundred objects on a first
// boot: one sync of the disk can cover as many writes.
const roleParts = 8

// ensurePriorityClasses creates upstream's priority classes that are missing, and reports whether all exist.
// After an error it reports false, so that the caller tries again.
func ensurePriorityClasses(ctx context.Context, client kubernetes.Interface) (done bool, err error) {
	classes := client.SchedulingV1().PriorityClasses()
	for _, class := range schedulingv1.SystemPriorityClasses() {
		_, err := classes.Get(ctx, class.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			_, err = classes.Create(ctx, class, metav1.CreateOptions{})
		}
		if err != nil && !apierrors.IsAlreadyExists(err) {
			return false, nil
		}
	}
	return true, nil
}
