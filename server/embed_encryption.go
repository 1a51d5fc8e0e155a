package server

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/client-go/kubernetes"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
)

// reloadHook is upstream's hook that reads the file of the encryption each minute. kedge tells the API server instead.
const reloadHook = "start-encryption-provider-config-automatic-reload"

// managesEncryption reports whether kedge may replace the configuration of the encryption of Secrets: the user has given no
// other file, and the file is one that kedge has written.
func (s *APIServer) managesEncryption() bool {
	etcd := s.opts.Etcd
	elsewhere := slices.ContainsFunc(etcd.EtcdServersOverrides, func(o string) bool { return strings.HasPrefix(o, "/secrets#") })
	return !s.cfg.ExternalDatastore && etcd.EncryptionProviderConfigFilepath == s.deps.Identity.EncryptionConfig && !etcd.EncryptionProviderConfigAutomaticReload &&
		!elsewhere && s.deps.Encryption.Managed() == nil
}

// whyForeign says why kedge may not replace the configuration.
func (s *APIServer) whyForeign() string {
	if s.cfg.ExternalDatastore {
		return "the datastore is an external etcd, in which kedge does not change the encryption"
	}
	return "the API server of " + s.cfg.NodeName + " was given another one with --kube-apiserver-arg"
}

// SecretsPrefix returns the prefix of the keys of Secrets in the datastore.
func (s *APIServer) SecretsPrefix() string {
	return "/" + strings.Trim(s.opts.Etcd.StorageConfig.Prefix, "/") + "/secrets/"
}

// encryption is how the API server gets another configuration of the encryption of Secrets. It implements
// secretsencryption.API.
type encryption struct {
	file         string
	server       string // upstream's ID of the API server, in metrics
	transformers *encryptionconfig.DynamicTransformers
	client       kubernetes.Interface
}

// attachEncryption gives the keeper of the configuration the API server that is being made from config.
func (s *APIServer) attachEncryption(config *app.Config) error {
	if !s.opts.Etcd.EncryptionProviderConfigAutomaticReload || !s.managed {
		return nil
	}
	generic := config.KubeAPIs.ControlPlane.Generic
	transformers, ok := generic.ResourceTransformers.(*encryptionconfig.DynamicTransformers)
	if _, found := generic.PostStartHooks[reloadHook]; !ok || !found {
		return errors.New("configure the API server: upstream's reloading of the encryption of Secrets has changed")
	}
	delete(generic.PostStartHooks, reloadHook)
	client, err := kubernetes.NewForConfig(s.deps.Loopback.Admin())
	if err != nil {
		return fmt.Errorf("make the client of the encryption of Secrets: %w", err)
	}
	s.deps.Encryption.SetAPI(&encryption{s.deps.Identity.EncryptionConfig, generic.APIServerID, transformers, client})
	return nil
}

// Reload implements secretsencryption.API.
func (e *encryption) Reload(context.Context) error {
	// The context is that of connections to a KMS, of which kedge's configurations have none.
	lifetime, end := context.WithCancel(context.Background())
	loaded, err := encryptionconfig.LoadEncryptionConfig(lifetime, e.file, true, e.server)
	if err == nil && len(loaded.HealthChecks) != 1 {
		err = fmt.Errorf("%d health checks, want one", len(loaded.HealthChecks))
	}
	if err != nil {
		end()
		return err
	}
	e.transformers.Set(loaded.Transformers, end, loaded.HealthChecks[0], loaded.KMSCloseGracePeriod)
	return nil
}

// CaughtUp implements secretsencryption.API: a consistent list waits until the cache has seen all changes before it.
func (e *encryption) CaughtUp(ctx context.Context) error {
	_, err := e.client.CoreV1().Secrets(metav1.NamespaceAll).List(ctx, metav1.ListOptions{Limit: 1})
	return err
}
