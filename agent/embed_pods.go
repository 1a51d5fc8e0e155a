package agent

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/kubelet"
	podconfig "k8s.io/kubernetes/pkg/kubelet/config"
	kubelettypes "k8s.io/kubernetes/pkg/kubelet/types"
	kubeletutil "k8s.io/kubernetes/pkg/kubelet/util"
	"k8s.io/kubernetes/pkg/volume"
)

// sourcePods creates the kubelet's sources of pods from the configuration as upstream would: files, a URL and
// the API. Pods of the API may be delivered only when the kubelet knows its own Node object, whose labels
// decide which pods it admits. Upstream checks that once a second, and its first check is always too early, so
// that the first pod of every start would wait for a second.
func (k *Kubelet) sourcePods(ctx context.Context, d *kubelet.Dependencies) {
	log, c, node := klog.FromContext(ctx), &k.server.KubeletConfiguration, types.NodeName(k.cfg.NodeName)
	events := record.NewBroadcaster(record.WithContext(ctx))
	events.StartStructuredLogging(3)
	events.StartRecordingToSink(&v1core.EventSinkImpl{Interface: d.EventClient.Events("")})
	d.Recorder = events.NewRecorder(legacyscheme.Scheme, corev1.EventSource{Component: "kubelet", Host: k.cfg.NodeName})
	d.PodStartupLatencyTracker = kubeletutil.NewPodStartupLatencyTracker()
	own := &ownNode{}
	d.VolumePlugins = append(d.VolumePlugins, own)

	pods := podconfig.NewPodConfig(d.Recorder, d.PodStartupLatencyTracker)
	if c.StaticPodPath != "" {
		podconfig.NewSourceFile(log, c.StaticPodPath, node, c.FileCheckFrequency.Duration, pods.Channel(ctx, kubelettypes.FileSource))
	}
	if c.StaticPodURL != "" {
		header := http.Header{}
		for name, values := range c.StaticPodURLHeader {
			for _, v := range values {
				header.Add(name, v)
			}
		}
		podconfig.NewSourceURL(log, c.StaticPodURL, header, node, c.HTTPCheckFrequency.Duration, pods.Channel(ctx, kubelettypes.HTTPSource))
	}
	known := func() bool { return own.await(ctx) }
	podconfig.NewSourceApiserver(log, d.KubeClient, node, known, pods.Channel(ctx, kubelettypes.ApiserverSource))
	d.PodConfig = pods
}

// ownNode is a volume plugin that supports no volume: the host of a plugin is the only interface through which
// upstream exposes the kubelet's knowledge of its own Node.
type ownNode struct {
	volume.VolumePlugin // nil: the other methods are called only for plugins that support a volume

	host atomic.Pointer[volume.VolumeHost]
}

func (n *ownNode) Init(host volume.VolumeHost) error {
	n.host.Store(&host)
	return nil
}

func (*ownNode) GetPluginName() string        { return "kedge.dev/own-node" }
func (*ownNode) CanSupport(*volume.Spec) bool { return false }

// await returns true when the kubelet knows its Node, and false when ctx ends before. Its interval grows,
// because an agent may wait for days until it reaches a server.
func (n *ownNode) await(ctx context.Context) bool {
	for began := time.Now(); ; {
		if host := n.host.Load(); host != nil {
			if _, err := (*host).GetNodeLabels(); err == nil {
				return true
			}
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(min(max(time.Since(began)/16, 5*time.Millisecond), podconfig.WaitForAPIServerSyncPeriod)):
		}
	}
}
