package command

import (
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"kedge/internal/control"
	"kedge/server/kubeconfigs"
)

func TestEncodeKubeconfig(t *testing.T) {
	made := control.CreatedKubeconfig{Certificate: "certificate", Authority: "authority", Server: "https://[2001:db8::1]:6443", Ends: time.Now()}
	data, err := encodeKubeconfig(kubeconfigs.Spec{User: "anna", Namespace: "web"}, made, []byte("key"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := clientcmd.Load(data)
	if err != nil {
		t.Fatal(err)
	}
	c := k.Contexts[k.CurrentContext]
	if k.CurrentContext != "anna@2001:db8::1" || c == nil || c.Namespace != "web" {
		t.Fatalf("the context %q is %+v", k.CurrentContext, c)
	}
	cluster, user := k.Clusters[c.Cluster], k.AuthInfos[c.AuthInfo]
	if cluster == nil || cluster.Server != made.Server || string(cluster.CertificateAuthorityData) != "authority" {
		t.Errorf("the cluster is %+v", cluster)
	}
	if user == nil || string(user.ClientCertificateData) != "certificate" || string(user.ClientKeyData) != "key" {
		t.Errorf("the user is %+v", user)
	}
}
