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
	taintutil "k8s.io/kubernetes/pkg/util/taints"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	"k8s.io/mount-utils"
	utilexec "k8s.io/utils/exec"
	"sigs.k8s.io/yaml"

	"kedge/agent/checkpoints"
	"kedge/agent/mounter"
	"kedge/agent/nodeobject"
	"kedge/internal/atomicfile"
	"kedge/internal/componentflags"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/internal/logging"
)

// Kubelet is the component that runs the kubelet.
type Kubelet struct {
	cfg    Config
	deps   Dependencies
	log    *slog.Logger
	server *options.KubeletServer

	started    time.Time // set by Run
	late       int       // number of late failures; used by Run only
	hasStarted bool      // upstream's kubelet has started, which it can do once; used by Run only
}

// NewKubelet parses the kubelet's flags and configuration files and stores the rest.
func NewKubelet(cfg Config, deps Dependencies, log *slog.Logger) (*Kubelet, error) {
	kc, err := options.NewKubeletConfiguration()
	if err != nil {
		return nil, fmt.Errorf("create the kubelet's configuration: %w", err)
	}
	k := &Kubelet{cfg: cfg, deps: deps, log: log, server: &options.KubeletServer{KubeletFlags: *options.NewKubeletFlags(), KubeletConfiguration: *kc}}
	if err := k.configure(); err != nil {
		return nil, err
	}
	return k, componentflags.ApplyVerbosity(&k.server.Logging, fromKubelet)
}

// configure lays the user's files and flags over the defaults.
func (k *Kubelet) configure() error {
	if err := k.defaults(); err != nil {
		return err
	}
	args, err := componentflags.Merge(nil, k.cfg.KubeletArgs, fromKubelet)
	if err != nil {
		return err
	}
	if err := k.parse(args); err != nil {
		return err
	}
	if k.server.KubeletConfigFile != "" || k.server.KubeletDropinConfigDirectory != "" {
		own := k.server.KubeletConfiguration.DeepCopy()
		if err := k.mergeFiles(); err != nil {
			return err
		}
		if err := checkFiles(own, &k.server.KubeletConfiguration); err != nil {
			return err
		}
		// Flags take precedence over files, so they are parsed again.
		if err := k.parse(args); err != nil {
			return err
		}
	}
	if err := options.ValidateKubeletFlags(&k.server.KubeletFlags); err != nil {
		return errorkind.BadSetting(fromKubelet, ": %w", err)
	}
	return nil
}

// parse applies the user's flags to the current configuration.
func (k *Kubelet) parse(args []string) error {
	fs := pflag.NewFlagSet("kubelet", pflag.ContinueOnError)
	fs.SetNormalizeFunc(cliflag.WordSepNormalizeFunc)
	k.server.AddFlags(fs)
	if err := fs.Parse(args); err != nil {
		return errorkind.BadSetting("kubelet-arg", ": %w", err)
	}
	// Upstream has seccomp-default as a flag and as a field, and enables it if either is true: the flag alone
	// could not disable it.
	if fs.Changed("seccomp-default") {
		k.server.KubeletConfiguration.SeccompDefault = k.server.KubeletFlags.SeccompDefault
	}
	return nil
}

// defaults sets kedge's defaults for the kubelet. Users can change all of them.
func (k *Kubelet) defaults() error {
	dir := k.cfg.kubeletDir()
	f := &k.server.KubeletFlags
	f.HostnameOverride = k.cfg.NodeName
	f.RootDirectory = dir
	f.CertDirectory = filepath.Join(dir, "pki")
	// With an empty path the kubelet would run without the API. The file is never read, because its clients are
	// set in its dependencies.
	f.KubeConfig = filepath.Join(dir, "unused")
	if k.cfg.AddressSourceOverridden() {
		var ips []string
		for _, ip := range k.cfg.NodeIPs {
			ips = append(ips, ip.String())
		}
		f.NodeIP = strings.Join(ips, ",")
	} else {
		// The kubelet reads its addresses only once, and a cloud controller manager may change them at any
		// time: nodeobject.Addresses replaces both.
		f.CloudProvider = "external"
		if len(k.cfg.NodeIPs) > 0 && k.cfg.NodeIPs[0].Is6() {
			f.NodeIP = "::" // so that IPv6 addresses of pods come first
		}
	}
	f.NodeLabels = map[string]string{}
	for _, l := range k.cfg.NodeLabels {
		key, value, ok := strings.Cut(l, "=")
		if !ok {
			return errorkind.BadItem("node-label", l, " %q: want KEY=VALUE", l)
		}
		f.NodeLabels[key] = value
	}

	c := &k.server.KubeletConfiguration
	for _, t := range k.cfg.NodeTaints {
		parsed, _, err := taintutil.ParseTaints([]string{t})
		if err != nil {
			return errorkind.BadItem("node-taint", t, " %q: %w", t, err)
		}
		c.RegisterWithTaints = append(c.RegisterWithTaints, parsed...)
	}
	c.Authentication.Anonymous.Enabled = false
	c.Authentication.Webhook.Enabled = true
	c.Authentication.X509.ClientCAFile = k.deps.ClientCA
	c.Authorization.Mode = kubeletconfig.KubeletAuthorizationModeWebhook
	c.TLSCertFile, c.TLSPrivateKeyFile = k.deps.ServingCert, k.deps.ServingKey
	c.TLSMinVersion = "VersionTLS12"
	c.Port = int32(k.cfg.KubeletPort)
	c.ReadOnlyPort = 0
	c.HealthzPort = 0 // kedge's own status replaces it, and no unneeded port is open

	c.ContainerRuntimeEndpoint = "unix://" + k.cfg.RuntimeEndpoint
	c.ImageServiceEndpoint = c.ContainerRuntimeEndpoint
	c.CgroupRoot = k.cfg.CgroupRoot
	if k.cfg.SystemdCgroups {
		c.CgroupDriver = "systemd"
	}
	c.FailCgroupV1 = false
	c.FailSwapOn = false
	c.MakeIPTablesUtilChains = false // it would run iptables
	c.SeccompDefault = true
	c.PodPidsLimit = 4096
	c.SerializeImagePulls = false
	for _, ip := range k.cfg.ClusterDNS {
		c.ClusterDNS = append(c.ClusterDNS, ip.String())
	}
	c.ClusterDomain = k.cfg.ClusterDomain
	c.ResolverConfig = k.cfg.ResolvConf
	c.StaticPodPath = k.cfg.StaticPodDir()
	c.PodLogsDir = k.cfg.places().PodLogs
	c.VolumePluginDir = filepath.Join(dir, "volume-plugins")
	c.EvictionHard = map[string]string{
		"memory.available": eviction.DefaultEvictionHard["memory.available"],
		// Upstream's 10 and 15 % are gigabytes, which small devices do not have.
		"nodefs.available": "5%", "nodefs.inodesFree": "5%", "imagefs.available": "5%",
	}
	return nil
}

// mergeFiles merges the user's --kubelet-arg=config=FILE and config-dir=DIR into the current configuration.
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
		if err := checkKind(abs); err != nil {
			return errorkind.BadSetting("kubelet-arg", "=config: %w", err)
		}
		loader, err := configfiles.NewFsLoader(&utilfs.DefaultFs{}, abs)
		if err != nil {
			return errorkind.BadSetting("kubelet-arg", "=config: %w", err)
		}
		patch, _, err := loader.LoadIntoJSON()
		if err != nil {
			return errorkind.BadSetting("kubelet-arg", "=config: read %s: %w", file, err)
		}
		if merged, err = jsonpatch.MergePatch(merged, patch); err != nil {
			return errorkind.BadSetting("kubelet-arg", "=config: merge %s: %w", file, err)
		}
	}
	result := &v1beta1.KubeletConfiguration{}
	if err := json.Unmarshal(merged, result); err != nil {
		return errorkind.BadSetting("kubelet-arg", "=config: %w", err)
	}
	scheme.Default(result)
	return scheme.Convert(result, &k.server.KubeletConfiguration, nil)
}

// checkKind returns an error if a file is not a KubeletConfiguration. Upstream's loader would print the whole
// file.
func checkKind(file string) error {
	data, err := atomicfile.ReadSmall(file, 1<<20)
	if err != nil {
		return err
	}
	var meta struct{ APIVersion, Kind string }
	if err := yaml.Unmarshal(data, &meta); err != nil {
		return fmt.Errorf("%s is not valid YAML: %w", file, err)
	}
	if want := v1beta1.SchemeGroupVersion.String(); meta.Kind != "KubeletConfiguration" || meta.APIVersion == "" {
		return fmt.Errorf("%s has apiVersion %q and kind %q; begin it with \"apiVersion: %s\" and \"kind: KubeletConfiguration\"", file, meta.APIVersion, meta.Kind, want)
	}
	return nil
}

// checkFiles reports fields in the user's files that are not allowed as flags either.
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
			errs = append(errs, errorkind.BadSetting(fromKubelet, "=config: %s cannot be set: %s", setting.name, decided[setting.flag]))
		}
	}
	if merged.Logging.Format != own.Logging.Format {
		errs = append(errs, errorkind.BadSetting(fromKubelet, "=config: logging.format cannot be set: %s", componentflags.Logging["logging-format"]))
	}
	return errors.Join(errs...)
}

// Name implements lifecycle.Component.
func (k *Kubelet) Name() string { return "kubelet" }

// Run implements lifecycle.Component. It calls ready when the node is Ready in the API.
func (k *Kubelet) Run(ctx context.Context, ready func()) error {
	c := &k.server.KubeletConfiguration
	if err := utilfeature.DefaultMutableFeatureGate.SetFromMap(c.FeatureGates); err != nil {
		return errorkind.BadSetting("kubelet-arg", "=feature-gates: %w", err)
	}
	if err := kubeletvalidation.ValidateKubeletConfiguration(c, utilfeature.DefaultFeatureGate); err != nil {
		return errorkind.BadSetting("kubelet-arg", ": %w", err)
	}
	for _, d := range []string{k.cfg.kubeletDir(), filepath.Dir(c.PodLogsDir), c.PodLogsDir, c.VolumePluginDir} {
		if err := atomicfile.MkdirAll(d, 0o750); err != nil {
			return fmt.Errorf("prepare the kubelet's directories: %w", err)
		}
	}
	if err := atomicfile.MkdirAll(c.StaticPodPath, 0o700); err != nil {
		return fmt.Errorf("prepare the folder for static pods: %w", err)
	}
	if k.hasStarted {
		return lifecycle.Final(errStarted)
	}
	if err := checkpoints.SetAside(k.cfg.kubeletDir(), stateFiles(), time.Now(), k.log); err != nil {
		return err
	}
	if err := k.checkStart(ctx); err != nil {
		return err
	}
	kubelet.ContainerLogsDir = k.cfg.places().LogLinks
	return k.attempt(ctx, ready)
}

// attempt runs upstream's kubelet until ctx ends or the kubelet fails.
func (k *Kubelet) attempt(ctx context.Context, ready func()) error {
	a := newAttempt()
	defer a.end()
	// stop ends those loops of the kubelet that can end.
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	deps, err := k.dependencies(ctx, a)
	if err != nil {
		return err
	}
	defer logging.FatalOf(func() { a.note(errFailed) }, "k8s.io/kubernetes/pkg/kubelet", "k8s.io/kubernetes/pkg/volume/csi", "k8s.io/kubernetes/cmd/kubelet")()
	began := time.Now()
	k.started = began.Truncate(time.Second) // heartbeats have a resolution of one second
	go func() {
		if k.waitNodeReady(ctx, deps.HeartbeatClient, began) == nil {
			ready()
		}
	}()
	returned := make(chan error, 1)
	go func() {
		err := errFailed
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("%w: %v", errPanic, p)
			}
			returned <- err
		}()
		err = app.Run(ctx, k.server, deps, utilfeature.DefaultFeatureGate)
	}()
	select {
	case err = <-returned: // before the kubelet's loops start, or because ctx has ended
		if ctx.Err() != nil {
			if errors.Is(err, errPanic) {
				return err
			}
			return nil // an error of the interrupted start
		}
	case err = <-a.failed:
		k.hasStarted = true
	}
	err = a.result(err, k.hasStarted, k.late)
	if a.isLate() {
		k.late++
	}
	return err
}

var errPanic = errors.New("panic")

var errFailed = errors.New("the kubelet failed; its last log messages have the reason")

// dependencies returns the same as upstream's UnsecuredDependencies, without the parts that would run programs
// of the host.
func (k *Kubelet) dependencies(ctx context.Context, a *attempt) (*kubelet.Dependencies, error) {
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
		OSInterface:         containedOS{logLinks: k.cfg.places().LogLinks},
		VolumePlugins:       plugins,
		DynamicPluginProber: afterControllers{app.GetDynamicPluginProber(ctx, k.server.VolumePluginDir, utilexec.New()), ctx, k.deps.Volumes},
		TLSOptions:          tls,
		OnHeartbeatFailure:  func() {}, // upstream would close its connections; the choice of the server is made below the client
	}
	client := a.client(k.deps.Client)
	if d.KubeClient, err = kubernetes.NewForConfig(client); err != nil {
		return nil, fmt.Errorf("create the kubelet's client: %w", err)
	}
	if !k.cfg.AddressSourceOverridden() {
		d.KubeClient = nodeobject.Creating(d.KubeClient, k.deps.Addresses, k.cfg.ExternalIPs)
	}
	if d.EventClient, err = v1core.NewForConfig(client); err != nil {
		return nil, fmt.Errorf("create the kubelet's client: %w", err)
	}
	// A heartbeat that hangs must not delay the next heartbeat.
	heartbeat := rest.CopyConfig(client)
	heartbeat.Timeout = min(k.server.NodeStatusUpdateFrequency.Duration, time.Duration(k.server.NodeLeaseDurationSeconds)*time.Second)
	if d.HeartbeatClient, err = kubernetes.NewForConfig(heartbeat); err != nil {
		return nil, fmt.Errorf("create the kubelet's client: %w", err)
	}
	if d.CAdvisorInterface, err = k.newCAdvisor(ctx); err != nil {
		return nil, err
	}
	k.sourcePods(ctx, d)
	a.guard(d)
	installPromptVolumes(a, d)
	return d, nil
}

// waitNodeReady returns nil when the node's condition Ready is true and this kubelet has reported it.
func (k *Kubelet) waitNodeReady(ctx context.Context, c kubernetes.Interface, began time.Time) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if node, err := k.nodeReady(ctx, c); err == nil && (k.isOwn(node) || k.renewsLease(ctx, c, began)) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// isOwn reports whether the last heartbeat of the node certainly came from this kubelet. Heartbeats have a
// resolution of one second: a heartbeat in the second of the start may be the previous kubelet's, unless the
// Node was created after that.
func (k *Kubelet) isOwn(node *corev1.Node) bool {
	if !node.CreationTimestamp.Time.Before(k.started) {
		return true
	}
	for _, cond := range node.Status.Conditions {
		if cond.Type == corev1.NodeReady {
			return cond.LastHeartbeatTime.Time.After(k.started)
		}
	}
	return false
}

// renewsLease reports whether this kubelet has renewed the node's lease. On the first start of a cluster the
// lease may be late, because its namespace is.
func (k *Kubelet) renewsLease(ctx context.Context, c kubernetes.Interface, began time.Time) bool {
	lease, err := c.CoordinationV1().Leases(corev1.NamespaceNodeLease).Get(ctx, k.cfg.NodeName, metav1.GetOptions{})
	return err == nil && lease.Spec.RenewTime != nil && lease.Spec.RenewTime.After(began)
}

// nodeReady returns the Node, or the reason why it is not Ready.
func (k *Kubelet) nodeReady(ctx context.Context, c kubernetes.Interface) (*corev1.Node, error) {
	node, err := c.CoreV1().Nodes().Get(ctx, k.cfg.NodeName, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	for _, cond := range node.Status.Conditions {
		if cond.Type == corev1.NodeReady {
			switch {
			case cond.LastHeartbeatTime.Time.Before(k.started):
				// After a restart the object still has the status from before it.
				return nil, errNotReported
			case cond.Status != corev1.ConditionTrue:
				return nil, errors.New(cond.Message)
			}
			return node, nil
		}
	}
	return nil, errNotReported
}

var errNotReported = errors.New("the node has not reported its status yet")

// Check implements lifecycle.Checker.
func (k *Kubelet) Check(ctx context.Context) error {
	c, err := kubernetes.NewForConfig(k.deps.Client)
	if err != nil {
		return err
	}
	_, err = k.nodeReady(ctx, c)
	return err
}

// Endpoint returns the address of the kubelet's server for clients in this process.
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

// StopTimeout implements lifecycle.StopTimeouter. It is short, because containers continue to run.
func (k *Kubelet) StopTimeout() time.Duration { return 3 * time.Second }
