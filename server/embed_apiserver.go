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

	"github.com/prometheus/client_golang/prometheus/promhttp"
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
	"kedge/internal/errorkind"
	"kedge/internal/lastbytes"
	"kedge/internal/pki"
	"kedge/internal/tunnel"
	"kedge/server/accountkeys"
	"kedge/server/arguments"
	"kedge/server/bootstrap"
	"kedge/server/cutoff"
	"kedge/server/identity"
	"kedge/server/join"
	"kedge/server/kubeconfigs"
	"kedge/server/loopback"
	"kedge/server/metricsplit"
	"kedge/server/nodeauthz"
	"kedge/server/peerrequests"
	"kedge/server/secretsencryption"
	"kedge/server/tunnels"
)

// ErrPortTaken is wrapped in the error if the API's port is in use.
var ErrPortTaken = errors.New("port is taken")

// APIServer is the component that runs kube-apiserver, with the aggregator and custom resource definitions.
type APIServer struct {
	cfg     Config
	deps    APIServerDependencies
	metrics http.Handler // all but the kubelet's
	cut     *cutoff.CutOff
	opts    *options.ServerRunOptions
	managed bool // kedge may replace the configuration of the encryption of Secrets
}

// APIServerDependencies are what the API server needs of other parts of the process.
type APIServerDependencies struct {
	Identity *identity.Identity
	Loopback *loopback.Loopback // is given the API's handler
	// Leadership returns the leader of the datastore, whose client factory must be installed before Run.
	Leadership func() (datastore.Leadership, <-chan struct{})
	// Joins and Hub answer on the API's port, behind Gate.
	Joins *join.Service
	Hub   *tunnels.Hub
	Gate  *join.Gate
	Users *kubeconfigs.Kubeconfigs
	// Encryption has the keys of Secrets, and answers the other servers. Members returns the names of the servers.
	Encryption *secretsencryption.Keeper
	Members    func(context.Context) ([]string, error)
	// Accounts has the keys of service accounts' tokens, which are used through AccountKeys.
	Accounts    *accountkeys.Keeper
	AccountKeys *AccountKeys
}

// NewAPIServer parses the component's flags and keeps the rest.
func NewAPIServer(cfg Config, deps APIServerDependencies) (*APIServer, error) {
	metrics, err := metricsplit.Split() // before the registry is used
	if err != nil {
		return nil, err
	}
	s := &APIServer{cfg: cfg, deps: deps, metrics: promhttp.HandlerFor(metrics, promhttp.HandlerOpts{}), opts: options.NewServerRunOptions()}
	s.cut = cutoff.New(func() (bool, <-chan struct{}) {
		now, changed := deps.Leadership()
		return now.Leader != "", changed
	})
	fs := pflag.NewFlagSet("kube-apiserver", pflag.ContinueOnError)
	for _, f := range s.opts.Flags().FlagSets {
		fs.AddFlagSet(f)
	}
	s.opts.Authentication.Anonymous.Allow = false // except for [healthPaths]; see anonymousRequests
	args, err := arguments.APIServer(s.defaults(), cfg.APIServerArgs)
	if err != nil {
		return nil, err
	}
	if err := fs.Parse(args); err != nil {
		return nil, errorkind.BadSetting(arguments.FromAPIServer, ": %w", err)
	}
	if err := s.knowsNodes(); err != nil {
		return nil, err
	}
	if s.managed = s.managesEncryption(); s.managed {
		s.opts.Etcd.EncryptionProviderConfigAutomaticReload = true // but see attachEncryption
	} else {
		deps.Encryption.SetForeign(s.whyForeign())
	}
	if s.signsElsewhere() {
		deps.Accounts.SetForeign()
	}
	return s, componentflags.ApplyVerbosity(s.opts.Logs, arguments.FromAPIServer)
}

// knowsNodes makes sure that a user's client-ca-file contains kedge's authority too, which signs the
// certificates of nodes, administrators and the API server itself.
func (s *APIServer) knowsNodes() error {
	file := s.opts.Authentication.ClientCert.ClientCA
	known, err := certutil.CertsFromFile(file)
	if err != nil {
		return errorkind.BadSetting(arguments.FromAPIServer, ": client-ca-file: %w", err)
	}
	if !slices.ContainsFunc(known, s.deps.Identity.ClientCA.Cert.Equal) {
		return errorkind.BadSetting(arguments.FromAPIServer, ": client-ca-file: %s lacks the authority that signs for nodes and administrators; append %s to it", file, s.deps.Identity.ClientCA.CertFile())
	}
	return nil
}

// healthPaths are the paths that may be requested without a certificate or token.
var healthPaths = []apiserver.AnonymousAuthCondition{{Path: "/livez"}, {Path: "/readyz"}, {Path: "/healthz"}}

// anonymousRequests allows anonymous requests for [healthPaths], unless the user has configured anonymous
// requests. Upstream accepts such a rule only in a file for authentication-config, which would exclude a user's
// own file and all oidc flags.
func (s *APIServer) anonymousRequests(known authenticator.Request) (authenticator.Request, error) {
	opts := s.opts.Authentication
	if opts.Anonymous.FlagsSet {
		return known, nil
	}
	if file := opts.AuthenticationConfigFile; file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, errorkind.BadSetting(arguments.FromAPIServer, ": authentication-config: %w", err)
		}
		if decided, err := arguments.SaysWhoIsAnonymous(data); decided || err != nil {
			return known, err
		}
	}
	return union.NewFailOnError(known, anonymous.NewAuthenticator(healthPaths)), nil
}

// defaults returns kedge's flags for kube-apiserver. Package arguments knows which of them users can replace,
// and to which they add values.
func (s *APIServer) defaults() map[string]string {
	d := map[string]string{
		"advertise-address":                       s.cfg.AdvertiseAddress.String(),
		"allow-privileged":                        "true",
		"authorization-mode":                      "Node,RBAC",
		"client-ca-file":                          s.deps.Identity.ClientCA.CertFile(),
		"enable-admission-plugins":                "NodeRestriction",
		"enable-aggregator-routing":               "true", // webhooks and extension APIs are reached at their pods
		"encryption-provider-config":              s.deps.Identity.EncryptionConfig,
		"endpoint-reconciler-type":                "none", // see directory.Endpoints
		"etcd-servers":                            datastore.Endpoint,
		"kubelet-certificate-authority":           s.deps.Identity.KubeletCA.CertFile(),
		"kubelet-client-certificate":              s.deps.Identity.KubeletClient.CertFile,
		"kubelet-client-key":                      s.deps.Identity.KubeletClient.KeyFile,
		"profiling":                               "false",
		"proxy-client-cert-file":                  s.deps.Identity.ProxyClient.CertFile,
		"proxy-client-key-file":                   s.deps.Identity.ProxyClient.KeyFile,
		"requestheader-allowed-names":             identity.ProxyUser,
		"requestheader-client-ca-file":            s.deps.Identity.ProxyCA.CertFile(),
		"requestheader-extra-headers-prefix":      "X-Remote-Extra-",
		"requestheader-group-headers":             "X-Remote-Group",
		"requestheader-username-headers":          "X-Remote-User",
		"secure-port":                             strconv.Itoa(s.cfg.HTTPSPort),
		"shutdown-watch-termination-grace-period": watchGrace.String(),
		"service-account-issuer":                  "https://kubernetes.default.svc." + s.cfg.ClusterDomain,
		"service-account-key-file":                s.deps.Identity.ServiceAccountKey,
		"service-account-signing-key-file":        s.deps.Identity.ServiceAccountKey,
		"service-cluster-ip-range":                joinPrefixes(s.cfg.ServiceCIDRs),
		"service-node-port-range":                 s.cfg.NodePortRange,
		"tls-cert-file":                           s.deps.Identity.Serving.CertFile,
		"tls-cipher-suites":                       strings.Join(cipherSuites, ","),
		"tls-min-version":                         "VersionTLS12",
		"tls-private-key-file":                    s.deps.Identity.Serving.KeyFile,
	}
	if s.cfg.BindAddress.IsValid() {
		d["bind-address"] = s.cfg.BindAddress.String()
	}
	return d
}

// cipherSuites are the suites for TLS 1.2 with forward secrecy and authenticated encryption. TLS 1.3 has no
// others.
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

// StopTimeout implements lifecycle.StopTimeouter: requests in flight are drained before the datastore stops.
func (s *APIServer) StopTimeout() time.Duration { return 6 * time.Second }

// Run implements lifecycle.Component. It calls ready when /readyz is ok.
func (s *APIServer) Run(ctx context.Context, ready func()) error {
	listener, err := s.listen(ctx)
	if err != nil {
		return err
	}
	defer listener.Close() // has no effect after the server has closed it
	requests, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	if s.managed {
		if err := s.deps.Encryption.Settle(ctx); err != nil || ctx.Err() != nil {
			return err
		}
	}
	if s.deps.Accounts.Settle(ctx); ctx.Err() != nil {
		return nil
	}
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
	s.deps.Loopback.Serve(server.handler)
	if err := s.waitReady(ctx, done); err != nil {
		if ctx.Err() != nil {
			return nil // the server was stopped during its start; upstream's error is irrelevant
		}
		return err
	}
	if err := bootstrap.Ensure(ctx, s.deps.Loopback.Admin(), s.cfg.ClusterDNS); err != nil && ctx.Err() == nil {
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

// ownNode reserves the name of this server's node, so that no joining machine can have it.
func (s *APIServer) ownNode(ctx context.Context) error {
	if !s.cfg.HasNode {
		return nil
	}
	key, err := pki.EnsureKey(s.deps.Identity.KubeletServing.KeyFile)
	if err != nil {
		return err
	}
	fingerprint, err := pki.Fingerprint(&key.PublicKey)
	if err != nil {
		return err
	}
	if err := s.deps.Joins.Nodes().Set(ctx, s.cfg.NodeName, fingerprint); err != nil {
		return fmt.Errorf("reserve this node's name: %w", err)
	}
	return nil
}

// listen opens the API's port, so that a port in use is reported before anything else is built.
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
		return nil, fmt.Errorf("this machine does not have the address %s; set another with --bind-address", host)
	}
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", addr, err)
	}
	return l, nil
}

// assembled is an API server that is ready to run.
type assembled struct {
	handler http.Handler
	run     func(context.Context) error
}

// cancelWith cancels requests when ctx ends.
func cancelWith(ctx context.Context, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		own, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(ctx, cancel)()
		next.ServeHTTP(w, r.WithContext(own))
	})
}

// assemble builds the API server. Requests in progress are cancelled when the context requests ends.
func (s *APIServer) assemble(ctx, requests context.Context, listener net.Listener) (*assembled, error) {
	// The API server calls itself and pods; its warnings do not belong in kedge's log.
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	goAwayTimeout = goAwayGrace
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
		return nil, errorkind.BadSetting(arguments.FromAPIServer, ": %w", errors.Join(errs...))
	}
	if err := s.attachAccountKeys(completed); err != nil {
		return nil, err
	}
	config, err := app.NewConfig(completed)
	if err != nil {
		return nil, fmt.Errorf("configure the API server: %w", err)
	}
	// The aggregator is the outermost of the three servers, and the only one whose handler chain authenticates.
	authn := &config.Aggregator.GenericConfig.Config.Authentication
	known, err := s.anonymousRequests(authn.Authenticator)
	if err != nil {
		return nil, err
	}
	authn.Authenticator = union.New(loopback.Authenticator(), s.deps.Users.Authenticator(), known)
	authz := &config.Aggregator.GenericConfig.Config.Authorization
	authz.Authorizer = nodeauthz.Patient(authz.Authorizer)
	chainOf := config.Aggregator.GenericConfig.Config.BuildHandlerChainFunc
	config.Aggregator.GenericConfig.Config.BuildHandlerChainFunc = func(api http.Handler, c *genericapiserver.Config) http.Handler {
		outside := s.deps.Joins.Handler(s.deps.Gate.Handler(lastbytes.Handler(chainOf(s.cut.Handler(s.ownMetrics(api), c.Serializer, ownRequest), c))))
		return cancelWith(requests, s.nodesFirst(s.serversFirst(outside)))
	}
	if err := errors.Join(throughTunnels(config, s.deps.Hub), s.attachEncryption(config)); err != nil {
		return nil, err
	}
	checkClaims(config, s.cfg)

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
	// The definitions are three copies of every type's schema. The documents that need them are built, and a
	// later use generates them again.
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

// ownRequest reports whether a request comes from this process: from kedge's own code, or from the API server
// itself, which connects to its port with a secret token.
func ownRequest(r *http.Request) bool {
	who, ok := request.UserFrom(r.Context())
	return loopback.Is(r) || ok && who.GetName() == user.APIServerUser
}

// ownMetrics serves /metrics in place of the API server, which would include the kubelet's metrics.
func (s *APIServer) ownMetrics(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/metrics" && r.Method == http.MethodGet {
			s.metrics.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// nodesFirst passes nodes' requests for a tunnel to the hub, and all other requests to next.
func (s *APIServer) nodesFirst(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == tunnel.Path {
			s.deps.Hub.ServeHTTP(w, r)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// serversFirst answers other servers' requests for what is theirs alone, and passes all others to next.
func (s *APIServer) serversFirst(next http.Handler) http.Handler {
	mux := http.NewServeMux()
	s.deps.Encryption.Answer(mux)
	s.deps.Accounts.Answer(mux)
	return peerrequests.Handler(s.cfg.NodeName, s.deps.Identity.PeerCA.Cert, s.deps.Members, mux, next)
}

// waitReady returns nil when /readyz is ok, an error if the server has ended, or ctx's error.
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
				err = errors.New("the API server exited before it was ready")
			}
			return err
		case <-ctx.Done():
			// No client was served yet. Some parts of the start do not react to the stop and try for half a
			// minute; the process exits before.
			select {
			case <-done:
			case <-time.After(abandonAfter):
			}
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// abandonAfter is the maximum time that an interrupted start may take to return.
const abandonAfter = time.Second

// Check implements lifecycle.Checker.
func (s *APIServer) Check(ctx context.Context) error {
	client, err := rest.HTTPClientFor(s.deps.Loopback.Admin())
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
	// The body is read to its end; otherwise the server logs a client that has disconnected.
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("/readyz answers %s: %s", resp.Status, strings.ReplaceAll(strings.TrimSpace(string(body)), "\n", ", "))
	}
	return nil
}
