package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/kubernetes"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	genericcontrollermanager "k8s.io/controller-manager/app"
	"k8s.io/controller-manager/pkg/clientbuilder"
	controllerhealthz "k8s.io/controller-manager/pkg/healthz"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/config"
	"k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
	serviceaccountcontroller "k8s.io/kubernetes/pkg/controller/serviceaccount"
	"k8s.io/kubernetes/pkg/serviceaccount"

	"kedge/internal/componentflags"
	"kedge/internal/errorkind"
	"kedge/server/arguments"
	"kedge/server/identity"
	"kedge/server/loopback"
)

// Controllers is the component that runs the controllers of kube-controller-manager once. A new Controllers is
// made for each term of leadership.
type Controllers struct {
	cfg      Config
	id       *identity.Identity
	loopback *loopback.Loopback
	opts     *options.KubeControllerManagerOptions
	build    VolumesBuilder
	accounts *AccountKeys
}

// VolumesBuilder calls build, which initialises the controllers' volume plugins, at a time when that does not
// affect the kubelet in this process.
type VolumesBuilder func(ctx context.Context, build func() error) error

// NewControllers parses the component's flags and keeps the rest. build may be nil
// where the process has no kubelet.
func NewControllers(cfg Config, id *identity.Identity, accounts *AccountKeys, lb *loopback.Loopback, build VolumesBuilder) (*Controllers, error) {
	if build == nil {
		build = func(_ context.Context, build func() error) error { return build() }
	}
	c := &Controllers{cfg: cfg, id: id, loopback: lb, build: build, accounts: accounts}
	var err error
	c.opts, err = parseControllers(c.defaults(), cfg.ControllerArgs)
	return c, err
}

// parseControllers lays user's flags over the defaults.
func parseControllers(defaults map[string]string, user []string) (*options.KubeControllerManagerOptions, error) {
	opts, err := options.NewKubeControllerManagerOptions()
	if err != nil {
		return nil, fmt.Errorf("make the controllers' options: %w", err)
	}
	flags := opts.Flags(app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases())
	fs := pflag.NewFlagSet("kube-controller-manager", pflag.ContinueOnError)
	for _, f := range flags.FlagSets {
		fs.AddFlagSet(f)
	}
	args, err := arguments.Controllers(defaults, user)
	if err != nil {
		return nil, err
	}
	if err := fs.Parse(args); err != nil {
		return nil, errorkind.BadSetting(arguments.FromControllers, ": %w", err)
	}
	return opts, componentflags.ApplyVerbosity(opts.Logs, arguments.FromControllers)
}

func (c *Controllers) defaults() map[string]string {
	return map[string]string{
		"allocate-node-cidrs": "true",
		"cluster-cidr":        joinPrefixes(c.cfg.ClusterCIDRs),
		"cluster-signing-kube-apiserver-client-cert-file": c.id.ClientCA.CertFile(),
		"cluster-signing-kube-apiserver-client-key-file":  c.id.ClientCA.KeyFile(),
		"cluster-signing-kubelet-client-cert-file":        c.id.ClientCA.CertFile(),
		"cluster-signing-kubelet-client-key-file":         c.id.ClientCA.KeyFile(),
		// The API server accepts only this authority for kubelets. The API's own authority must not sign for
		// clients that can choose a name, so it is not used here. Without a certificate the fourth signer,
		// legacy-unknown, is off: it has no restrictions, and no client uses it any more.
		"cluster-signing-kubelet-serving-cert-file": c.id.KubeletCA.CertFile(),
		"cluster-signing-kubelet-serving-key-file":  c.id.KubeletCA.KeyFile(),
		// Upstream's is in /usr, and is created.
		"flex-volume-plugin-dir":           filepath.Join(c.cfg.Dir, "volume-plugins"),
		"leader-elect":                     "false",
		"master":                           unreachableURL, // satisfies the option; the clients are replaced later
		"profiling":                        "false",
		"root-ca-file":                     c.id.PodsCA,
		"secure-port":                      "0", // the API server's endpoint has metrics and health
		"service-account-private-key-file": c.id.ServiceAccountKey,
		"service-cluster-ip-range":         joinPrefixes(c.cfg.ServiceCIDRs),
		"use-service-account-credentials":  "true",
	}
}

// Name implements lifecycle.Component.
func (c *Controllers) Name() string { return "controllers" }

// Run implements lifecycle.Component. It calls ready when all controllers are built.
func (c *Controllers) Run(ctx context.Context, ready func()) error {
	cfg, err := c.configure(ctx)
	if err != nil {
		return err
	}
	completed := cfg.Complete()
	cfg.EventBroadcaster.StartStructuredLogging(0)
	cfg.EventBroadcaster.StartRecordingToSink(&v1core.EventSinkImpl{Interface: cfg.Client.CoreV1().Events("")})
	defer cfg.EventBroadcaster.Shutdown()

	health := controllerhealthz.NewMutableHealthzHandler()
	mux := genericcontrollermanager.NewBaseHandler(&completed.ComponentConfig.Generic.Debugging, health)
	if completed.SecureServing != nil { // only with a secure-port set by the user
		handler := genericcontrollermanager.BuildHandlerChain(mux, &completed.Authorization, &completed.Authentication)
		if _, _, err := completed.SecureServing.Serve(handler, 0, ctx.Done()); err != nil {
			return fmt.Errorf("serve the controllers' port: %w", err)
		}
	}

	if !waitHealthy(ctx, cfg.Client) {
		return nil // stopped before
	}
	clients := controllerClients{c.loopback}
	cc, err := app.CreateControllerContext(ctx, completed, clients.root(), clients)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("create the controllers' context: %w", err)
	}
	defer cc.InformerFactory.Shutdown() // releases its name for the next term
	descriptors := app.NewControllerDescriptors()
	delete(descriptors, names.ServiceAccountTokenController) // its client must be given from outside; see tokens
	checksPolicies := cc.IsControllerEnabled(descriptors[names.ValidatingAdmissionPolicyStatusController])
	delete(descriptors, names.ValidatingAdmissionPolicyStatusController) // see policyStatus
	var controllers []app.Controller
	err = c.build(ctx, func() (err error) {
		controllers, err = app.BuildControllers(ctx, cc, descriptors, mux, health)
		return err
	})
	if ctx.Err() != nil {
		return nil // some of them wait for the API while they are built
	}
	if err != nil {
		return fmt.Errorf("build the controllers: %w", err)
	}
	tokens, err := c.tokens(ctx, cc, clients)
	if err != nil {
		return err
	}
	policies := func(context.Context) {}
	if checksPolicies {
		if policies, err = policyStatus(cc); err != nil {
			return err
		}
	}
	cc.InformerFactory.Start(ctx.Done())
	cc.ObjectOrMetadataInformerFactory.Start(ctx.Done())
	close(cc.InformersStarted)
	var own sync.WaitGroup
	own.Go(func() { tokens(ctx) })
	own.Go(func() { policies(ctx) })
	defer own.Wait()
	ready()
	// Upstream spreads the start of controllers over a second, for an API server with many other clients. Here
	// the API server is in this process.
	if !app.RunControllers(ctx, cc, controllers, 0, completed.ControllerShutdownTimeout) {
		return errors.New("some controllers did not stop in time")
	}
	return nil
}

// waitHealthy waits until the API server is healthy, and returns false if ctx ends before. Upstream's own wait
// ignores ctx, and fails after ten seconds: a server that leads only briefly would have to exit.
func waitHealthy(ctx context.Context, client kubernetes.Interface) bool {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		status := 0
		ask, cancel := context.WithTimeout(ctx, 2*time.Second)
		client.Discovery().RESTClient().Get().AbsPath("/healthz").Do(ask).StatusCode(&status)
		cancel()
		if status == http.StatusOK {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-tick.C:
		}
	}
}

// configure returns the component's configuration with clients that use the loopback.
func (c *Controllers) configure(ctx context.Context) (*config.Config, error) {
	cfg, err := c.opts.Config(ctx, app.KnownControllers(), app.ControllersDisabledByDefault(), app.ControllerAliases())
	if err != nil {
		return nil, errorkind.BadSetting(arguments.FromControllers, ": %w", err)
	}
	cfg.Kubeconfig = c.loopback.Config("system:kube-controller-manager")
	if cfg.Client, err = kubernetes.NewForConfig(cfg.Kubeconfig); err != nil {
		return nil, fmt.Errorf("create the controllers' client: %w", err)
	}
	return cfg, nil
}

// tokens returns the controller that fills secrets of type service-account-token. Upstream's descriptor accepts
// a client only inside its package.
func (c *Controllers) tokens(ctx context.Context, cc app.ControllerContext, clients controllerClients) (func(context.Context), error) {
	client, err := clients.root().Client("tokens-controller")
	if err != nil {
		return nil, err
	}
	t, err := serviceaccountcontroller.NewTokensController(klog.FromContext(ctx),
		cc.InformerFactory.Core().V1().ServiceAccounts(), cc.InformerFactory.Core().V1().Secrets(), client,
		serviceaccountcontroller.TokensControllerOptions{TokenGenerator: c.accounts.generator(serviceaccount.LegacyIssuer), RootCA: c.id.ServerCA.PEM()})
	if err != nil {
		return nil, fmt.Errorf("create the token controller: %w", err)
	}
	return func(ctx context.Context) { t.Run(ctx, int(cc.ComponentConfig.SAController.ConcurrentSATokenSyncs)) }, nil
}

// unreachableURL is the API's address for upstream code that requires an address before its client is replaced, and
// may send requests meanwhile: the port refuses connections at once. A host name would be looked up, which
// takes seconds if the machine's resolver is unreachable.
const unreachableURL = "http://127.0.0.1:0"

// controllerClients gives each controller a client that acts as its own service account, as upstream does with
// tokens. Here no token is needed.
type controllerClients struct{ loopback *loopback.Loopback }

var _ clientbuilder.ControllerClientBuilder = controllerClients{}

// root returns clients that act as kube-controller-manager itself, for the shared informers.
func (c controllerClients) root() clientbuilder.ControllerClientBuilder {
	return clientbuilder.SimpleControllerClientBuilder{ClientConfig: c.loopback.Config("system:kube-controller-manager")}
}

func (c controllerClients) Config(name string) (*rest.Config, error) {
	return c.loopback.Config("system:serviceaccount:kube-system:"+name, "system:serviceaccounts", "system:serviceaccounts:kube-system"), nil
}

func (c controllerClients) ConfigOrDie(name string) *rest.Config {
	cfg, _ := c.Config(name) // cannot fail
	return cfg
}

func (c controllerClients) Client(name string) (kubernetes.Interface, error) {
	return kubernetes.NewForConfig(c.ConfigOrDie(name))
}

func (c controllerClients) ClientOrDie(name string) kubernetes.Interface {
	return kubernetes.NewForConfigOrDie(c.ConfigOrDie(name))
}

func (c controllerClients) DiscoveryClient(name string) (discovery.DiscoveryInterface, error) {
	return discovery.NewDiscoveryClientForConfig(c.ConfigOrDie(name))
}

func (c controllerClients) DiscoveryClientOrDie(name string) discovery.DiscoveryInterface {
	return discovery.NewDiscoveryClientForConfigOrDie(c.ConfigOrDie(name))
}
