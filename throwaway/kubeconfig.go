package throwaway

import (
	"fmt"

	"kedge/throwaway/kubeconfig"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// writeKubeconfig makes the cluster's own kubeconfig from the file that its first server has
// written, with the server's address on the switch and the names of the cluster.
func (c *Cluster) writeKubeconfig() error {
	first := c.site.Machines()[0]
	made, err := clientcmd.LoadFromFile(first.Disk(adminKubeconfig))
	if err != nil {
		return err
	}
	current := made.Contexts[made.CurrentContext]
	if current == nil {
		return fmt.Errorf("%s has no current context", first.Disk(adminKubeconfig))
	}
	cluster, user := made.Clusters[current.Cluster], made.AuthInfos[current.AuthInfo]
	if cluster == nil || user == nil {
		return fmt.Errorf("%s lacks the cluster or the user of its current context", first.Disk(adminKubeconfig))
	}
	cluster.Server = fmt.Sprintf("https://%s:6443", first.Addrs()[0].Addr())
	name := c.Context()
	own := api.NewConfig()
	own.Clusters[name], own.AuthInfos[name] = cluster, user
	own.Contexts[name] = &api.Context{Cluster: name, AuthInfo: name}
	own.CurrentContext = name
	return clientcmd.WriteToFile(*own, c.Kubeconfig())
}

// Config returns the configuration of a client with all rights in the cluster.
func (c *Cluster) Config() (*rest.Config, error) {
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err == nil {
		config.QPS = -1
	}
	return config, err
}

// addContext merges the cluster's context into a kubeconfig of the user and makes it the
// current context. Nothing else in the file changes.
func (c *Cluster) addContext(path string) error {
	return kubeconfig.Add(path, c.Kubeconfig(), c.Context())
}
