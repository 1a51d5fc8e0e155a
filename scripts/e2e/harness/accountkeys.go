package harness

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/control"
)

// AccountKeys returns the keys of service accounts' tokens. While the server cannot say, the stage is the error.
func (n *Node) AccountKeys(t *testing.T) (s control.AccountKeys) {
	t.Helper()
	if err := control.Get(t.Context(), n.RunDir(), control.AccountKeysPath, nil, &s); err != nil {
		s.Stage = err.Error()
	}
	return s
}

// NewAccountToken returns a token of the namespace's service account "default", for an hour, as pods get them.
func (n *Node) NewAccountToken(t *testing.T, namespace string) string {
	t.Helper()
	made, err := n.Client.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return made.Status.Token
}

// AcceptsToken returns nil if the API of this server takes a token for that of the namespace's service account "default".
func (n *Node) AcceptsToken(token, namespace string) error {
	config := rest.AnonymousClientConfig(n.Config)
	config.BearerToken = token
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	who, err := client.AuthenticationV1().SelfSubjectReviews().Create(context.Background(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	if want := "system:serviceaccount:" + namespace + ":default"; who.Status.UserInfo.Username != want {
		return fmt.Errorf("it is taken for that of %s", who.Status.UserInfo.Username)
	}
	return nil
}

// KeyOfToken returns the ID of the key that has signed a token.
func KeyOfToken(t *testing.T, token string) string {
	t.Helper()
	first, _, _ := strings.Cut(token, ".")
	var header struct{ Kid string }
	data, err := base64.RawURLEncoding.DecodeString(first)
	if err == nil {
		err = json.Unmarshal(data, &header)
	}
	if err != nil {
		t.Fatalf("%q is no token: %v", token, err)
	}
	return header.Kid
}

// PublishedKeys returns the IDs of the keys that the API of this server publishes for who verifies tokens, sorted.
func (n *Node) PublishedKeys(t *testing.T) (ids []string) {
	t.Helper()
	data, err := n.Client.RESTClient().Get().AbsPath("/openid/v1/jwks").DoRaw(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var set struct{ Keys []struct{ Kid string } }
	if err := json.Unmarshal(data, &set); err != nil {
		t.Fatal(err)
	}
	for _, k := range set.Keys {
		ids = append(ids, k.Kid)
	}
	slices.Sort(ids)
	return ids
}
