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
// TestHooksMatchUpstream of internal/house fails when it changes.
//
//go:linkname ensureRBACPolicy k8s.io/kubernetes/pkg/registry/rbac/rest.ensureRBACPolicy
func ensureRBACPolicy(p *rbacrest.PolicyData, client kubernetes.Interface) (done bool, err error)

// bootHooks puts two of upstream's hooks in a place where they do not wait: those that
// bring the roles and the priority classes that every cluster has, for which /readyz
// waits. Upstream's own let a second pass before they begin. It changes config, and
// returns what is to be called with the servers that were made of it.
func (s *APIServer) bootHooks(config *app.Config) (install func(*genericapiserver.GenericAPIServer) error) {
	hooks := map[string]func(context.Context, kubernetes.Interface) (bool, error){
		rbacrest.PostStartHookName:       ensureRoles,
		schedulingrest.PostStartHookName: ensurePriorityClasses,
	}
	disabled := config.KubeAPIs.ControlPlane.Generic.DisabledPostStartHooks
	for name := range hooks {
		if disabled.Has(name) { // as that for roles, where the user wants another authorizer than RBAC
			delete(hooks, name)
		}
		disabled.Insert(name)
	}
	return func(server *genericapiserver.GenericAPIServer) error {
		for name, ensure := range hooks {
			disabled.Delete(name)
			err := server.AddPostStartHook(name, func(hook genericapiserver.PostStartHookContext) error {
				client, err := kubernetes.NewForConfig(s.loopback.Admin())
				if err != nil {
					return err
				}
				err = wait.PollUntilContextTimeout(hook.Context, 200*time.Millisecond, 30*time.Second, true, func(ctx context.Context) (bool, error) {
					return ensure(ctx, client)
				})
				if hook.Context.Err() != nil {
					return nil // the server stops: an error would end the process
				}
				return err // as upstream: without them the server is of no use
			})
			if err != nil {
				return err
			}
		}
		return nil
	}
}

// ensureRoles is ensureRBACPolicy with everything that a cluster has, in parts that run
// beside each other: most of the time of the first boot goes to waiting for the disk.
func ensureRoles(ctx context.Context, client kubernetes.Interface) (done bool, err error) {
	// What older clusters have under other names comes first.
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

// roleParts is in how many parts the roles and bindings are brought, some two hundred
// objects on a first boot: as many can be on the disk with one flush of it.
const roleParts = 8

// ensurePriorityClasses creates those of upstream's priority classes that are missing,
// and reports whether all are there. What went wrong is tried again.
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
