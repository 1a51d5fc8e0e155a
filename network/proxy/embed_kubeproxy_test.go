package proxy

import (
	"context"
	"net"
	"os/exec"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
	kubeproxyconfig "k8s.io/kubernetes/pkg/proxy/apis/config"
	kubeproxy "k8s.io/kubernetes/pkg/proxy/nftables"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"
)

// upstreamProxy is kube-proxy's own nftables mode, for the benchmarks: the processing of
// objects, without the program around it that fetches them.
type upstreamProxy struct{ *kubeproxy.Proxier }

func newUpstreamProxy(b *testing.B) contender {
	if _, err := exec.LookPath("nft"); err != nil {
		b.Skip("kube-proxy needs the program nft: install nftables")
	}
	klog.SetLogger(klog.Logger{})
	bit := int32(14) // kube-proxy's defaults, but that it waits for nothing
	config := &kubeproxyconfig.KubeProxyConfiguration{
		SyncPeriod: metav1.Duration{Duration: 30 * time.Second}, MinSyncPeriod: metav1.Duration{},
		NFTables: kubeproxyconfig.KubeProxyNFTablesConfiguration{MasqueradeBit: &bit}, NodePortAddresses: []string{benchNode.String() + "/32"},
	}
	p, err := kubeproxy.NewProxier(context.Background(), config, corev1.IPv4Protocol, proxyutil.NewDetectLocalByCIDR("10.42.0.0/16"),
		"node1", net.IP(benchNode.AsSlice()), nil, nil, false)
	if err != nil {
		b.Fatal(err)
	}
	return &upstreamProxy{p}
}

func (p *upstreamProxy) begin(services []*corev1.Service, slices []*discoveryv1.EndpointSlice) error {
	for _, s := range services {
		p.OnServiceAdd(s)
	}
	for _, s := range slices {
		p.OnEndpointSliceAdd(s)
	}
	p.OnServiceSynced()
	p.OnEndpointSlicesSynced() // writes the rules before it returns
	go p.SyncLoop()            // never ends: the benchmark's process does
	return nil
}

func (p *upstreamProxy) change(old, now *discoveryv1.EndpointSlice) {
	p.OnEndpointSliceUpdate(old, now)
}

func (p *upstreamProxy) end() {}
