package appliance

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"kedge/internal/joining"
)

// apiTimeout is the time limit of a request to the API.
const apiTimeout = 5 * time.Second

// nodeAPI asks the cluster's API about a node of this machine. A server uses the kubeconfig that it has written, and an
// agent its own certificate, which may read the node's object and its pods.
type nodeAPI struct {
	DataDir    string
	Kubeconfig string // of a server; empty for an agent
}

// NodeReady reports whether a node is Ready, and otherwise why not.
func (in Install) NodeReady(ctx context.Context, name string) (ready bool, why string, err error) {
	return nodeAPI{DataDir: in.DataDir, Kubeconfig: in.Kubeconfig}.NodeReady(ctx, name)
}

// NodeReady reports whether a node is Ready, and otherwise why not.
func (a nodeAPI) NodeReady(ctx context.Context, name string) (ready bool, why string, err error) {
	err = a.with(func(c kubernetes.Interface) error {
		node, err := c.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, cond := range node.Status.Conditions {
			if cond.Type == corev1.NodeReady {
				ready, why = cond.Status == corev1.ConditionTrue, cond.Message
			}
		}
		return nil
	})
	return ready, why, err
}

// Pods returns the pods of a node.
func (a nodeAPI) Pods(ctx context.Context, node string) (pods []corev1.Pod, err error) {
	err = a.with(func(c kubernetes.Interface) error {
		list, err := c.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + node})
		if err == nil {
			pods = list.Items
		}
		return err
	})
	return pods, err
}

// Versions returns the version of the API server, and those of the nodes' kubelets by the name of the node. An agent may
// not list nodes: then there are none.
func (a nodeAPI) Versions(ctx context.Context) (server string, kubelets map[string]string, err error) {
	err = a.with(func(c kubernetes.Interface) error {
		v, err := c.Discovery().ServerVersion()
		if err != nil {
			return err
		}
		server = v.GitVersion
		if a.Kubeconfig == "" {
			return nil
		}
		nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		kubelets = map[string]string{}
		for _, n := range nodes.Items {
			kubelets[n.Name] = n.Status.NodeInfo.KubeletVersion
		}
		return nil
	})
	return server, kubelets, err
}

// with calls f with a client whose connections end afterwards.
func (a nodeAPI) with(f func(kubernetes.Interface) error) error {
	config, err := a.config()
	if err != nil {
		return err
	}
	config.Timeout = apiTimeout
	config.Proxy = func(*http.Request) (*url.URL, error) { return nil, nil } // the cluster is not behind the proxy
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		return err
	}
	defer transport.CloseIdleConnections()
	client, err := kubernetes.NewForConfigAndClient(config, transport)
	if err != nil {
		return err
	}
	return f(client)
}

func (a nodeAPI) config() (*rest.Config, error) {
	if a.Kubeconfig != "" {
		return clientcmd.BuildConfigFromFlags("", a.Kubeconfig)
	}
	dir := filepath.Join(a.DataDir, "agent")
	state, joined, err := joining.ReadState(joining.Agent, dir)
	if err != nil {
		return nil, err
	}
	if !joined {
		return nil, fmt.Errorf("%s has not joined a cluster", dir)
	}
	cert, key, ca := joining.ClientFiles(dir)
	return &rest.Config{Host: state.Server, TLSClientConfig: rest.TLSClientConfig{CertFile: cert, KeyFile: key, CAFile: ca}}, nil
}
