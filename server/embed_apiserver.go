package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/request/anonymous"
	"k8s.io/apiserver/pkg/authentication/request/union"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/request"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	certutil "k8s.io/client-go/util/cert"
	openapicommon "k8s.io/kube-openapi/pkg/common"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"

	"kedge/datastore"
	"kedge/internal/componentflags"
	"kedge/internal/pki"
	"kedge/internal/tunnel"
	"kedge/server/arguments"
	"kedge/server/bootstrap"
	"kedge/server/cutoff"
	"kedge/server/identity"
	"kedge/server/join"
	"kedge/server/loopback"
	"kedge/server/tunnels"
)

// ErrPortTaken is wrapped when the API's port is in use.
var ErrPortTaken = errors.New("port is taken")

// APIServer is the component that runs kube-apiserver, with the aggregator and
// custom resources.
type APIServer struct {
	cfg      Config
	id       *identity.Identity
	loopback *loopback.Loopback
	joins    *join.Service
	gate     *join.Gate
	hub      *tunnels.Hub
	cut      *cutoff.CutOff
	opts     *options.ServerRunOptions
}

// NewAPIServer parses the component's flags and keeps the rest. The store's
// client factory must be installed before Run. joins and hub answer on the same
// port, and gate comes before all else that does.
func NewAPIServer(cfg Config, id *identity.Identity, lb *loopback.Loopback, joins *join.Service, gate *join.Gate, hub *tunnels.Hub, store *datastore.Store) (*APIServer, error) {
	s := &APIServer{cfg: cfg, id: id, loopback: lb, joins: joins, gate: gate, hub: hub, opts: options.NewServerRunOptions()}
	s.cut = cutoff.New(func() (bool, <-chan struct{}) {
		now, changed := store.Leadership()
		return now.Leader != "", changed
	})
	fs := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, f := range s.opts.Flags().FlagSets {
		fs.AddFlagSet(f)
	}
	s.opts.Authentication.Anonymous.Allow = false // but for [healthPaths]; see strangers
	args, err := arguments.APIServer(s.defaults(), cfg.APIServerArgs)
	if err != nil {
		return nil, err
	}
	if err := fs.Parse(args); err != nil {
		return nil, fmt.Errorf("%s: %w", arguments.FromAPIServer, err)
	}
	if err := s.knowsNodes(); err != nil {
		return nil, err
	}
	return s, componentflags.ApplyVerbosity(s.opts.Logs, arguments.FromAPIServer)
}

// knowsNodes makes sure that a user's client-ca-file has kedge's authority too, by whose
// certificates nodes, administrators and the API server itself are known.
func (s *APIServer) knowsNodes() error {
	file := s.opts.Authentication.ClientCert.ClientCA
	known, err := certutil.CertsFromFile(file)
	if err != nil {
		return fmt.Errorf("%s: client-ca-file: %w", arguments.FromAPIServer, err)
	}
	if !slices.ContainsFunc(known, s.id.ClientCA.Cert.Equal) {
		return fmt.Errorf("%s: client-ca-file: %s lacks the authority that signs for nodes and administrators; append %s to it", arguments.FromAPIServer, file, s.id.ClientCA.CertFile())
	}
	return nil
}

// healthPaths are what may be asked without a certificate or token.
var healthPaths = []apiserver.AnonymousAuthCondition{{Path: "/livez"}, {Path: "/readyz"}, {Path: "/healthz"}}

// strangers lets those ask for [healthPaths] who show nothing, unless the user has said
// who may ask for what. Upstream can say this in a file for authentication-config only,
// which would exclude a user's own such file and all flags of oidc.
func (s *APIServer) strangers(known authenticator.Request) (authenticator.Request, error) {
	opts := s.opts.Authentication
	if opts.Anonymous.FlagsSet {
		return known, nil
	}
	if file := opts.AuthenticationConfigFile; file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, fmt.Errorf("%s: authentication-config: %w", arguments.FromAPIServer, err)
		}
		if said, err := arguments.SaysWhoIsAnonymous(data); said || err != nil {
			return known, err
		}
	}
	return union.NewFailOnError(known, anonymous.NewAuthenticator(healthPaths)), nil
}

// defaults are the flags that kedge gives. Which of them users can replace, and which they
// add to, is known to package arguments.
func (s *APIServer) defaults() map[string]string {
	d := map[string]string{
		"advertise-address":                       s.cfg.AdvertiseAddress.String(),
		"allow-privileged":                        "true",
		"authorization-mode":                      "Node,RBAC",
		"client-ca-file":                          s.id.ClientCA.CertFile(),
		"enable-admission-plugins":                "NodeRestriction",
		"enable-aggregator-routing":               "true", // webhooks and extension APIs are reached at their pods
		"encryption-provider-config":              s.id.EncryptionConfig,
		"endpoint-reconciler-type":                "none", // see directory.Endpoints
		"etcd-servers":                            datastore.Endpoint,
		"kubelet-certificate-authority":           s.id.KubeletCA.CertFile(),
		"kubelet-client-certificate":              s.id.KubeletClient.CertFile,
		"kubelet-client-key":                      s.id.KubeletClient.KeyFile,
		"profiling":                               "false",
		"proxy-client-cert-file":                  s.id.ProxyClient.CertFile,
		"proxy-client-key-file":                   s.id.ProxyClient.KeyFile,
		"requestheader-allowed-names":             identity.ProxyUser,
		"requestheader-client-ca-file":            s.id.ProxyCA.CertFile(),
		"requestheader-extra-headers-prefix":      "X-Remote-Extra-",
		"requestheader-group-headers":             "X-Remote-Group",
		"requestheader-username-headers":          "X-Remote-User",
		"secure-port":                             strconv.Itoa(s.cfg.HTTPSPort),
		"shutdown-watch-termination-grace-period": watchGrace.String(),
		"service-account-issuer":                  "https://kubernetes.default.svc." + s.cfg.ClusterDomain,
		"service-account-key-file":                s.id.ServiceAccountKey,
		"service-account-signing-key-file":        s.id.ServiceAccountKey,
		"service-cluster-ip-range":                joinPrefixes(s.cfg.ServiceCIDRs),
		"service-node-port-range":                 s.cfg.NodePortRange,
		"tls-cert-file":                           s.id.Serving.CertFile,
		"tls-cipher-suites":                       strings.Join(cipherSuites, ","),
		"tls-min-version":                         "VersionTLS12",
		"tls-private-key-file":                    s.id.Serving.KeyFile,
	}
	if s.cfg.BindAddress.IsValid() {
		d["bind-address"] = s.cfg.BindAddress.String()
	}
	return d
}

// When the server stops, watches of clients are ended within watchGrace, and
// connections that are still open after connectionGrace are cut, and requests that
// still wait for something ended: where the store has no majority that is seven seconds.
// Upstream's minute is for load balancers in front; here every second is one in which
// nothing answers.
const (
	watchGrace      = time.Second
	connectionGrace = 3 * time.Second
)

// cipherSuites for TLS 1.2: forward secrecy and authenticated encryption only.
// TLS 1.3 has no others.
var cipherSuites = []string{
	"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",
	"TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384", "TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256",
}

func joinPrefixes(ps []netip.Prefix) string {
	var out []string
	for _, p := range ps {
		out = append(out, p.String())
	}
	return strings.Join(out, ",")
}

// Name implements lifecycle.Component.
func (s *APIServer) Name() string { return "api" }

// StopTimeout implements lifecycle.StopTimeouter: requests in flight are
// drained before the store goes.
func (s *APIServer) StopTimeout() time.Duration { return 6 * time.Second }

// Run implements lifecycle.Component. It is ready when /readyz is.
func (s *APIServer) Run(ctx context.Context, ready func()) error {
	listener, err := s.listen(ctx)
	if err != nil {
		return err
	}
	defer listener.Close() // harmless after the server has closed it
	requests, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	server, err := s.assemble(ctx, requests, listener)
	if err != nil {
		return err
	}
	stop, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(stop, func() { time.AfterFunc(connectionGrace, end) })()
	done := make(chan error, 1)
	go func() { done <- server.run(stop) }()
	go s.cut.Follow(stop)
	s.loopback.Serve(server.handler)
	if err := s.waitReady(ctx, done); err != nil {
		if ctx.Err() != nil {
			return nil // it was stopped, and what upstream makes of that is no failure
		}
		return err
	}
	if err := bootstrap.Ensure(ctx, s.loopback.Admin(), s.cfg.ClusterDNS); err != nil && ctx.Err() == nil {
		cancel()
		return errors.Join(err, <-done)
	}
	if err := s.ownNode(ctx); err != nil && ctx.Err() == nil {
		cancel()
		return errors.Join(err, <-done)
	}
	ready()
	return <-done
}

// ownNode keeps the name of this server's node from machines that join.
func (s *APIServer) ownNode(ctx context.Context) error {
	if !s.cfg.HasNode {
		return nil
	}
	key, err := pki.EnsureKey(s.id.KubeletServing.KeyFile)
	if err != nil {
		return err
	}
	fingerprint, err := pki.Fingerprint(&key.PublicKey)
	if err != nil {
		return err
	}
	if err := s.joins.Nodes().Set(ctx, s.cfg.NodeName, fingerprint); err != nil {
		return fmt.Errorf("keep this node's name: %w", err)
	}
	return nil
}

// listen opens the API's port, so that a port that is taken is found before
// anything else is built.
func (s *APIServer) listen(ctx context.Context) (net.Listener, error) {
	host := ""
	if s.opts.SecureServing.BindAddress != nil && !s.opts.SecureServing.BindAddress.IsUnspecified() {
		host = s.opts.SecureServing.BindAddress.String()
	}
	addr := net.JoinHostPort(host, strconv.Itoa(s.opts.SecureServing.BindPort))
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("%w: another program listens on %s; stop it, or choose another port with --https-listen-port", ErrPortTaken, addr)
	}
	if errors.Is(err, syscall.EADDRNOTAVAIL) {
		return nil, fmt.Errorf("this machine has no address %s; give another with --bind-address", host)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

// assembled is the API server, ready to run.
type assembled struct {
	handler http.Handler
	run     func(context.Context) error
}

// until ends requests with ctx.
func until(ctx context.Context, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		own, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		next.ServeHTTP(w, r.WithContext(own))
	})
}

// assemble makes the API server. Requests that are under way end with the context
// requests.
func (s *APIServer) assemble(ctx, requests context.Context, listener net.Listener) (*assembled, error) {
	// The API server calls itself and pods; its warnings are not for our log.
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	s.opts.SecureServing.Listener = listener
	name, err := cache.NewInformerName("kube-apiserver")
	if err != nil {
		return nil, fmt.Errorf("assemble the API server: %w", err)
	}
	s.opts.InformerName = name
	completed, err := s.opts.Complete(ctx)
	if err != nil {
		return nil, fmt.Errorf("complete the API server's options: %w", err)
	}
	if errs := completed.Validate(); len(errs) != 0 {
		return nil, fmt.Errorf("%s: %w", arguments.FromAPIServer, errors.Join(errs...))
	}
	config, err := app.NewConfig(completed)
	if err != nil {
		return nil, fmt.Errorf("configure the API server: %w", err)
	}
	// The aggregator is the outermost of the three servers and the only one
	// whose handler chain authenticates.
	authn := &config.Aggregator.GenericConfig.Config.Authentication
	known, err := s.strangers(authn.Authenticator)
	if err != nil {
		return nil, err
	}
	authn.Authenticator = union.New(loopback.Authenticator(), known)
	chainOf := config.Aggregator.GenericConfig.Config.BuildHandlerChainFunc
	config.Aggregator.GenericConfig.Config.BuildHandlerChainFunc = func(api http.Handler, c *genericapiserver.Config) http.Handler {
		return until(requests, s.nodesFirst(s.joins.Handler(s.gate.Handler(chainOf(s.cut.Handler(api, c.Serializer, ownRequest), c)))))
	}
	if err := throughTunnels(config, s.hub); err != nil {
		return nil, err
	}
	checkAddresses(config, s.cfg)

	complete, err := config.Complete()
	if err != nil {
		return nil, fmt.Errorf("configure the API server: %w", err)
	}
	installOpenAPI, installHooks := lateOpenAPI(config), s.bootHooks(config)
	chain, err := app.CreateServerChain(complete)
	if err != nil {
		return nil, fmt.Errorf("assemble the API server: %w", err)
	}
	if err := installHooks(chain.GenericAPIServer); err != nil {
		return nil, fmt.Errorf("assemble the API server: %w", err)
	}
	chain.GenericAPIServer.ShutdownTimeout = connectionGrace
	prepared, err := chain.PrepareRun()
	if err != nil {
		return nil, fmt.Errorf("prepare the API server: %w", err)
	}
	if err := installOpenAPI(chain.GenericAPIServer); err != nil {
		return nil, fmt.Errorf("prepare the API server: %w", err)
	}
	// Three copies of every type's schema; the documents that need them are
	// built, and a later user would make them again from the code.
	for _, g := range []*openapicommon.OpenAPIV3Config{
		config.KubeAPIs.ControlPlane.Generic.OpenAPIV3Config,
		config.ApiExtensions.GenericConfig.OpenAPIV3Config,
		config.Aggregator.GenericConfig.OpenAPIV3Config,
	} {
		if g != nil {
			g.Definitions = nil
		}
	}
	return &assembled{handler: chain.GenericAPIServer.Handler, run: prepared.Run}, nil
}

// ownRequest reports whether a request is this process's: kedge's own, or one of the API
// server to itself, which takes the way over the port with a secret of its own.
func ownRequest(r *http.Request) bool {
	who, ok := request.UserFrom(r.Context())
	return loopback.Is(r) || ok && who.GetName() == user.APIServerUser
}

// nodesFirst passes the requests of nodes for a tunnel to the hub, and all others on.
func (s *APIServer) nodesFirst(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == tunnel.Path {
			s.hub.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// waitReady returns nil when /readyz answers ok, or why it never will: ctx's error
// when that has ended.
func (s *APIServer) waitReady(ctx context.Context, done <-chan error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if s.Check(ctx) == nil {
			return nil
		}
		select {
		case err := <-done:
			if err == nil {
				err = errors.New("the API server ended before it was ready")
			}
			return err
		case <-ctx.Done():
			// Nobody was served yet. Some parts of the start do not end when they
			// are stopped and try for half a minute; the process ends before.
			select {
			case <-done:
			case <-time.After(abandonAfter):
			}
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// abandonAfter is how long a start that was cut short may take to come to its end.
const abandonAfter = time.Second

// Check implements lifecycle.Checker.
func (s *APIServer) Check(ctx context.Context) error {
	client, err := rest.HTTPClientFor(s.loopback.Admin())
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://kedge.internal/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	// All of it, or the server notes a client that hung up.
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz answers %s: %s", resp.Status, strings.ReplaceAll(strings.TrimSpace(string(body)), "\n", ", "))
	}
	return nil
}
