package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	jsonpatch "gopkg.in/evanphx/json-patch.v4"

	"github.com/spf13/pflag"
	"go.opentelemetry.io/otel/trace/noop"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/kubernetes"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kubelet/config/v1beta1"
	"k8s.io/kubernetes/cmd/kubelet/app"
	"k8s.io/kubernetes/cmd/kubelet/app/options"
	"k8s.io/kubernetes/pkg/kubelet"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/apis/config"
	kubeletscheme "k8s.io/kubernetes/pkg/kubelet/apis/config/scheme"
	kubeletvalidation "k8s.io/kubernetes/pkg/kubelet/apis/config/validation"
	"k8s.io/kubernetes/pkg/kubelet/eviction"
	"k8s.io/kubernetes/pkg/kubelet/kubeletconfig/configfiles"
	utilfs "k8s.io/kubernetes/pkg/util/filesystem"
	"k8s.io/kubernetes/pkg/util/oom"
	taintutil "k8s.io/kubernetes/pkg/util/taints"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	"k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"

	"kedge/agent/mounter"
	"kedge/internal/atomicfile"
	"kedge/internal/componentflags"
)

// Kubelet is the component that runs the kubelet.
type Kubelet struct {
	cfg    Config
	log    *slog.Logger
	server *options.KubeletServer

	started time.Time // set by Run
}

// NewKubelet parses the component's flags and keeps the rest.
func NewKubelet(cfg Config, log *slog.Logger) (*Kubelet, error) {
	kc, err := options.NewKubeletConfiguration()
	if err != nil {
		return nil, fmt.Errorf("make the kubelet's configuration: %w", err)
	}
	k := &Kubelet{cfg: cfg, log: log, server: &options.KubeletServer{KubeletFlags: *options.NewKubeletFlags(), KubeletConfiguration: *kc}}
	if err := k.defaults(); err != nil {
		return nil, err
	}
	args, err := componentflags.Merge(nil, cfg.KubeletArgs, fromKubelet)
	if err != nil {
		return nil, err
	}
	if err := k.parse(args); err != nil {
		return nil, err
	}
	if k.server.KubeletConfigFile != "" || k.server.KubeletDropinConfigDirectory != "" {
		own := k.server.KubeletConfiguration.DeepCopy()
		if err := k.mergeFiles(); err != nil {
			return nil, err
		}
		if err := checkFiles(own, &k.server.KubeletConfiguration); err != nil {
			return nil, err
		}
		// Flags win over files, so they have to be read again.
		if err := k.parse(args); err != nil {
			return nil, err
		}
	}
	if err := options.ValidateKubeletFlags(&k.server.KubeletFlags); err != nil {
		return nil, fmt.Errorf("%s: %w", fromKubelet, err)
	}
	return k, componentflags.ApplyVerbosity(&k.server.Logging, fromKubelet)
}

// parse reads user's flags over what is set already.
func (k *Kubelet) parse(args []string) error {
	fs := pflag.NewFlagSet("kubelet", pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	k.server.AddFlags(fs)
	if err := fs.Parse(args); err != nil {
		return fmt.Errorf("--kubelet-arg: %w", err)
	}
	// Upstream has this one twice and takes either for a yes: the flag alone could
	// not say no to what the configuration says.
	if fs.Changed("seccomp-default") {
		k.server.KubeletConfiguration.SeccompDefault = k.server.KubeletFlags.SeccompDefault
	}
	return nil
}

// defaults sets what kedge wants of the kubelet. Users can change all of it.
func (k *Kubelet) defaults() error {
	dir := k.cfg.kubeletDir()
	f := &k.server.KubeletFlags
	f.HostnameOverride = k.cfg.NodeName
	f.RootDirectory = dir
	f.CertDirectory = filepath.Join(dir, "pki")
	// The kubelet would run without an API if this were empty. Its clients are
	// given to it, so the file is never read.
	f.KubeConfig = filepath.Join(dir, "unused")
	if k.cfg.OthersAddresses() {
		var ips []string
		for _, ip := range k.cfg.NodeIPs {
			ips = append(ips, ip.String())
		}
		f.NodeIP = strings.Join(ips, ",")
	} else {
		// The kubelet reads its addresses once, and a cloud's controller may change them
		// when it likes: NodeAddresses is in its place.
		f.CloudProvider = "external"
		if len(k.cfg.NodeIPs) > 0 && k.cfg.NodeIPs[0].Is6() {
			f.NodeIP = "::" // so that pods' addresses of this family come first
		}
	}
	f.NodeLabels = map[string]string{}
	for _, l := range k.cfg.NodeLabels {
		key, value, ok := strings.Cut(l, "=")
		if !ok {
			return fmt.Errorf("--node-label %q: want KEY=VALUE", l)
		}
		f.NodeLabels[key] = value
	}

	c := &k.server.KubeletConfiguration
	for _, t := range k.cfg.NodeTaints {
		parsed, _, err := taintutil.ParseTaints([]string{t})
		if err != nil {
			return fmt.Errorf("--node-taint %q: %w", t, err)
		}
		c.RegisterWithTaints = append(c.RegisterWithTaints, parsed...)
	}
	c.Authentication.Anonymous.Enabled = false
	c.Authentication.Webhook.Enabled = true
	c.Authentication.X509.ClientCAFile = k.cfg.ClientCA
	c.Authorization.Mode = kubeletconfig.KubeletAuthorizationModeWebhook
	c.TLSCertFile, c.TLSPrivateKeyFile = k.cfg.ServingCert, k.cfg.ServingKey
	c.TLSMinVersion = "VersionTLS12"
	c.Port = int32(k.cfg.KubeletPort)
	c.ReadOnlyPort = 0
	c.HealthzPort = 0 // kedge's own status answers; no port is open that nobody needs

	c.ContainerRuntimeEndpoint = "unix://" + k.cfg.RuntimeEndpoint
	c.ImageServiceEndpoint = c.ContainerRuntimeEndpoint
	c.CgroupRoot = k.cfg.CgroupRoot
	if k.cfg.SystemdCgroups {
		c.CgroupDriver = "systemd"
	}
	c.FailCgroupV1 = false
	c.FailSwapOn = false
	c.MakeIPTablesUtilChains = false // would run iptables
	c.SeccompDefault = true
	c.PodPidsLimit = 4096
	c.SerializeImagePulls = false
	for _, ip := range k.cfg.ClusterDNS {
		c.ClusterDNS = append(c.ClusterDNS, ip.String())
	}
	c.ClusterDomain = k.cfg.ClusterDomain
	c.ResolverConfig = k.cfg.ResolvConf
	c.StaticPodPath = k.cfg.StaticPodDir()
	c.PodLogsDir = filepath.Join(k.cfg.logDir(), "pods")
	c.VolumePluginDir = filepath.Join(dir, "volume-plugins")
	c.EvictionHard = map[string]string{
		"memory.available": eviction.DefaultEvictionHard["memory.available"],
		// Upstream's 10 and 15 % are gigabytes that small devices do not have.
		"nodefs.available": "5%", "nodefs.inodesFree": "5%", "imagefs.available": "5%",
	}
	return nil
}

// mergeFiles lays the user's --kubelet-arg=config=FILE and config-dir=DIR over
// what is set so far.
func (k *Kubelet) mergeFiles() error {
	scheme, _, err := kubeletscheme.NewSchemeAndCodecs()
	if err != nil {
		return err
	}
	base := &v1beta1.KubeletConfiguration{}
	if err := scheme.Convert(&k.server.KubeletConfiguration, base, nil); err != nil {
		return fmt.Errorf("convert the kubelet's configuration: %w", err)
	}
	merged, err := json.Marshal(base)
	if err != nil {
		return err
	}
	var files []string
	if f := k.server.KubeletConfigFile; f != "" {
		files = append(files, f)
	}
	if d := k.server.KubeletDropinConfigDirectory; d != "" {
		more, err := filepath.Glob(filepath.Join(d, "*.conf"))
		if err != nil {
			return err
		}
		slices.Sort(more)
		files = append(files, more...)
	}
	for _, file := range files {
		abs, err := filepath.Abs(file)
		if err != nil {
			return err
		}
		loader, err := configfiles.NewFsLoader(&utilfs.DefaultFs{}, abs)
		if err != nil {
			return fmt.Errorf("--kubelet-arg=config: %w", err)
		}
		patch, _, err := loader.LoadIntoJSON()
		if err != nil {
			return fmt.Errorf("--kubelet-arg=config: read %s: %w", file, err)
		}
		if merged, err = jsonpatch.MergePatch(merged, patch); err != nil {
			return fmt.Errorf("--kubelet-arg=config: merge %s: %w", file, err)
		}
	}
	result := &v1beta1.KubeletConfiguration{}
	if err := json.Unmarshal(merged, result); err != nil {
		return fmt.Errorf("--kubelet-arg=config: %w", err)
	}
	scheme.Default(result)
	return scheme.Convert(result, &k.server.KubeletConfiguration, nil)
}

// checkFiles says what the user's files change that cannot be given as a flag either.
func checkFiles(own, merged *kubeletconfig.KubeletConfiguration) error {
	var errs []error
	for _, setting := range []struct {
		name, flag string
		of         func(*kubeletconfig.KubeletConfiguration) any
	}{
		{"authentication.x509.clientCAFile", "client-ca-file", func(c *kubeletconfig.KubeletConfiguration) any { return c.Authentication.X509.ClientCAFile }},
		{"cgroupDriver", "cgroup-driver", func(c *kubeletconfig.KubeletConfiguration) any { return c.CgroupDriver }},
		{"cgroupRoot", "cgroup-root", func(c *kubeletconfig.KubeletConfiguration) any { return c.CgroupRoot }},
		{"containerRuntimeEndpoint", "container-runtime-endpoint", func(c *kubeletconfig.KubeletConfiguration) any { return c.ContainerRuntimeEndpoint }},
		{"imageServiceEndpoint", "image-service-endpoint", func(c *kubeletconfig.KubeletConfiguration) any { return c.ImageServiceEndpoint }},
		{"port", "port", func(c *kubeletconfig.KubeletConfiguration) any { return c.Port }},
		{"serverTLSBootstrap", "rotate-server-certificates", func(c *kubeletconfig.KubeletConfiguration) any { return c.ServerTLSBootstrap }},
		{"tlsCertFile", "tls-cert-file", func(c *kubeletconfig.KubeletConfiguration) any { return c.TLSCertFile }},
		{"tlsPrivateKeyFile", "tls-private-key-file", func(c *kubeletconfig.KubeletConfiguration) any { return c.TLSPrivateKeyFile }},
	} {
		if setting.of(own) != setting.of(merged) {
			errs = append(errs, fmt.Errorf("%s=config: %s cannot be set: %s", fromKubelet, setting.name, decided[setting.flag]))
		}
	}
	if merged.Logging.Format != own.Logging.Format {
		errs = append(errs, fmt.Errorf("%s=config: logging.format cannot be set: %s", fromKubelet, componentflags.Logging["logging-format"]))
	}
	return errors.Join(errs...)
}

// Name implements lifecycle.Component.
func (k *Kubelet) Name() string { return "kubelet" }

// Run implements lifecycle.Component. It is ready when the node is Ready in the API.
func (k *Kubelet) Run(ctx context.Context, ready func()) error {
	c := &k.server.KubeletConfiguration
	if err := utilfeature.DefaultMutableFeatureGate.SetFromMap(c.FeatureGates); err != nil {
		return fmt.Errorf("--kubelet-arg=feature-gates: %w", err)
	}
	if err := kubeletvalidation.ValidateKubeletConfiguration(c, utilfeature.DefaultFeatureGate); err != nil {
		return fmt.Errorf("--kubelet-arg: %w", err)
	}
	for _, d := range []string{k.cfg.kubeletDir(), k.cfg.logDir(), c.PodLogsDir, c.VolumePluginDir} {
		if err := atomicfile.MkdirAll(d, 0o750); err != nil {
			return fmt.Errorf("prepare the kubelet's directories: %w", err)
		}
	}
	if err := atomicfile.MkdirAll(c.StaticPodPath, 0o700); err != nil {
		return fmt.Errorf("prepare the folder for static pods: %w", err)
	}
	kubelet.ContainerLogsDir = filepath.Join(k.cfg.logDir(), "containers")
	deps, err := k.dependencies(ctx)
	if err != nil {
		return err
	}
	k.started = time.Now().Truncate(time.Second) // heartbeats have no finer clock
	watch, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		if k.waitNodeReady(watch, deps.HeartbeatClient) == nil {
			ready()
		}
	}()
	return app.Run(ctx, k.server, deps, utilfeature.DefaultFeatureGate)
}

// dependencies are what upstream's UnsecuredDependencies makes, without what
// would run programs of the host.
func (k *Kubelet) dependencies(ctx context.Context) (*kubelet.Dependencies, error) {
	tls, err := app.InitializeTLS(ctx, &k.server.KubeletFlags, &k.server.KubeletConfiguration)
	if err != nil {
		return nil, fmt.Errorf("prepare the kubelet's TLS: %w", err)
	}
	plugins, err := app.ProbeVolumePlugins(ctx, utilfeature.DefaultFeatureGate)
	if err != nil {
		return nil, fmt.Errorf("find the kubelet's volume plugins: %w", err)
	}
	var m mount.MounterForceUnmounter = &mounter.Mounter{}
	d := &kubelet.Dependencies{
		TracerProvider:      noop.NewTracerProvider(),
		HostUtil:            hostutil.NewHostUtil(),
		Mounter:             m,
		Subpather:           subpath.New(m),
		OOMAdjuster:         oom.NewOOMAdjuster(),
		OSInterface:         containedOS{logLinks: filepath.Join(k.cfg.logDir(), "containers")},
		VolumePlugins:       plugins,
		DynamicPluginProber: afterControllers{app.GetDynamicPluginProber(ctx, k.server.VolumePluginDir, utilexec.New()), ctx, k.cfg.Volumes},
		TLSOptions:          tls,
		OnHeartbeatFailure:  func() {}, // upstream drops its connections; which server is called is decided below the client
	}
	if d.KubeClient, err = kubernetes.NewForConfig(k.cfg.Client); err != nil {
		return nil, fmt.Errorf("make the kubelet's client: %w", err)
	}
	if !k.cfg.OthersAddresses() {
		d.KubeClient = &registering{d.KubeClient, k.cfg.Addresses, k.cfg.ExternalIPs}
	}
	if d.EventClient, err = v1core.NewForConfig(k.cfg.Client); err != nil {
		return nil, fmt.Errorf("make the kubelet's client: %w", err)
	}
	// A heartbeat that hangs must not keep the next one back.
	heartbeat := rest.CopyConfig(k.cfg.Client)
	heartbeat.Timeout = min(k.server.NodeStatusUpdateFrequency.Duration, time.Duration(k.server.NodeLeaseDurationSeconds)*time.Second)
	if d.HeartbeatClient, err = kubernetes.NewForConfig(heartbeat); err != nil {
		return nil, fmt.Errorf("make the kubelet's client: %w", err)
	}
	if d.CAdvisorInterface, err = k.measure(ctx); err != nil {
		return nil, err
	}
	k.sourcePods(ctx, d)
	return d, nil
}

// waitNodeReady returns nil when the node's condition Ready is true.
func (k *Kubelet) waitNodeReady(ctx context.Context, c kubernetes.Interface) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if k.nodeReady(ctx, c) == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// nodeReady returns nil, or why the node is not Ready.
func (k *Kubelet) nodeReady(ctx context.Context, c kubernetes.Interface) error {
	node, err := c.CoreV1().Nodes().Get(ctx, k.cfg.NodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, cond := range node.Status.Conditions {
		if cond.Type == corev1.NodeReady {
			switch {
			case cond.LastHeartbeatTime.Time.Before(k.started):
				// After a restart the object still says what was true before it.
				return errNotReported
			case cond.Status != corev1.ConditionTrue:
				return errors.New(cond.Message)
			}
			return nil
		}
	}
	return errNotReported
}

var errNotReported = errors.New("the node has not reported yet")

// Check implements lifecycle.Checker.
func (k *Kubelet) Check(ctx context.Context) error {
	c, err := kubernetes.NewForConfig(k.cfg.Client)
	if err != nil {
		return err
	}
	return k.nodeReady(ctx, c)
}

// Endpoint is where the kubelet listens, for this process itself.
func (k *Kubelet) Endpoint() netip.AddrPort {
	a, err := netip.ParseAddr(k.server.Address)
	switch {
	case err != nil || a == netip.IPv4Unspecified():
		a = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case a == netip.IPv6Unspecified():
		a = netip.IPv6Loopback()
	}
	return netip.AddrPortFrom(a, uint16(k.server.Port))
}

// StopTimeout implements lifecycle.StopTimeouter: containers go on running, so
// there is little to stop.
func (k *Kubelet) StopTimeout() time.Duration { return 3 * time.Second }
