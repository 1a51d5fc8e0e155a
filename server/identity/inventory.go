package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"kedge/internal/errorkind"
	"kedge/internal/pki"
)

// Names of the files of leaf certificates.
const (
	servingAPI    = "serving-kube-apiserver"
	kubeletClient = "client-kube-apiserver"
	adminClient   = "client-admin"
	proxyClient   = "client-auth-proxy"
	nodeClient    = "client-node"
)

// leafFile is a leaf certificate that a server keeps.
type leafFile struct {
	name      string
	authority string
	key       string // of whose file; the node's key is the node's identity, and never changes
	usedBy    string
}

var leafFiles = []leafFile{
	{servingAPI, authorities[0], servingAPI, "the API, towards all its clients"},
	{kubeletClient, authorities[2], kubeletClient, "the API server, towards kubelets"},
	{proxyClient, authorities[3], proxyClient, "the API server, towards extension API servers"},
	{adminClient, authorities[2], adminClient, "the administrator's kubeconfig"},
	{servingKubelet, authorities[1], servingKubelet, "this machine's kubelet, towards the API server"},
	{nodeClient, authorities[2], servingKubelet, "this machine's node, towards the other servers"},
	{peerLeaf, peerCA, peerLeaf, "the datastore, towards the other servers"},
}

// uses says what the authorities sign.
var uses = map[string]string{
	"server-ca": "signs the API's certificate", "kubelet-ca": "signs the kubelets' certificates", "client-ca": "signs for clients of the API",
	"request-header-ca": "signs for the API server, towards extension API servers", peerCA: "signs for the datastores",
}

// Certificates examines all certificates of the server in dir, and the one in the administrator's kubeconfig.
func Certificates(dir, kubeconfig string, now time.Time) (all []pki.Examined) {
	in := func(name string) string { return filepath.Join(tlsDir(dir), name) }
	for _, ca := range authorities {
		all = append(all, pki.File{Name: ca, CertFile: in(ca + ".crt"), KeyFile: in(ca + ".key"), UsedBy: uses[ca]}.Examine(now))
	}
	for _, l := range leafFiles {
		all = append(all, pki.File{
			Name: l.name, CertFile: in(l.name + ".crt"), KeyFile: in(l.key + ".key"), AuthorityFile: in(l.authority + ".crt"), UsedBy: l.usedBy,
		}.Examine(now))
	}
	return append(all, examineKubeconfig(kubeconfig, in(authorities[2]+".crt"), now))
}

// examineKubeconfig examines the certificate in the administrator's kubeconfig.
func examineKubeconfig(path, authority string, now time.Time) pki.Examined {
	f := pki.File{Name: "kubeconfig", CertFile: path, AuthorityFile: authority, UsedBy: "the administrator's kubectl"}
	bad := func(problem string) pki.Examined {
		return pki.Examined{Name: f.Name, File: path, Names: []string{}, UsedBy: f.UsedBy, Problem: problem}
	}
	st, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return bad("it is missing")
	}
	if err != nil {
		return bad(err.Error())
	}
	k, err := clientcmd.LoadFromFile(path)
	if err != nil {
		return bad("it cannot be read as a kubeconfig")
	}
	c := k.Contexts[k.CurrentContext]
	if c == nil || k.AuthInfos[c.AuthInfo] == nil {
		return bad("its context has no user")
	}
	return f.ExamineData(k.AuthInfos[c.AuthInfo].ClientCertificateData, st.ModTime(), now)
}

// chosen returns the leaf certificates with the names, all without names.
func chosen(names []string) (leaves []leafFile, err error) {
	for _, n := range names {
		switch {
		case slices.ContainsFunc(leafFiles, func(l leafFile) bool { return l.name == n }):
		case slices.Contains(authorities, n):
			return nil, errorkind.BadUsage(fmt.Errorf("%s is an authority; this command makes new certificates under the same authorities", n))
		case n == "kubeconfig":
			return nil, errorkind.BadUsage(fmt.Errorf("the certificate in the administrator's kubeconfig is that of %s; give this name", adminClient))
		default:
			var known []string
			for _, l := range leafFiles {
				known = append(known, l.name)
			}
			return nil, errorkind.BadUsage(fmt.Errorf("a server has no certificate %q; it has %s", n, strings.Join(known, ", ")))
		}
	}
	for _, l := range leafFiles {
		if len(names) == 0 || slices.Contains(names, l.name) {
			leaves = append(leaves, l)
		}
	}
	return leaves, nil
}

// Rotate signs the certificates with the names again, all without names, with new keys except for those of the node's key,
// for the same names and addresses. The server in dir must not run; when it starts, it writes the administrator's kubeconfig
// and corrects names and addresses that have changed. It returns the names of the certificates.
func Rotate(dir string, names []string, now time.Time) (rotated []string, err error) {
	leaves, err := chosen(names)
	if err != nil {
		return nil, err
	}
	for _, l := range leaves {
		path := filepath.Join(tlsDir(dir), l.name+".crt")
		data, err := os.ReadFile(path)
		if err != nil {
			return rotated, fmt.Errorf("%w; start kedge, which makes a missing certificate", err)
		}
		old, err := pki.ParseCertificate(path, data)
		if err != nil {
			return rotated, err
		}
		ca, err := pki.LoadAuthority(tlsDir(dir), l.authority, now)
		if err != nil {
			return rotated, err
		}
		if err := l.sign(ca, dir, pki.LeafOf(old), now); err != nil {
			return rotated, err
		}
		rotated = append(rotated, l.name)
	}
	return rotated, nil
}

// sign signs a leaf certificate again, for a new key unless it is the node's.
func (l leafFile) sign(ca *pki.Authority, dir string, want pki.Leaf, now time.Time) error {
	return ca.Renew(filepath.Join(tlsDir(dir), l.name+".crt"), filepath.Join(tlsDir(dir), l.key+".key"), l.key != servingKubelet, want, now)
}
