package join

import (
	"context"
	"crypto/tls"
	"net/http"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/joining"
)

// TestAnswerAfterTheBodysTime: the time in which a body must arrive does not end the request: over HTTP/1.1 the server
// reads on, to learn when the client goes away.
func TestAnswerAfterTheBodysTime(t *testing.T) {
	c := newCluster(t, nil)
	c.now = func() time.Time { return time.Now().Add(100*time.Millisecond - bodyWithin) }
	for range maxAtOnce {
		c.slots <- struct{}{}
	}
	time.AfterFunc(500*time.Millisecond, func() { <-c.slots })
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		TLSNextProto:    map[string]func(string, *tls.Conn) http.RoundTripper{},
	}}
	defer client.CloseIdleConnections()
	resp, err := client.Get(c.url + joining.PathCA)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK || resp.ProtoMajor != 1 {
		t.Errorf("%s over %s", resp.Status, resp.Proto)
	}
}

// TestTokenBesideADamagedOne: a token that is damaged is no reason to refuse another, which would be live all the same.
func TestTokenBesideADamagedOne(t *testing.T) {
	c := newCluster(t, nil)
	c.token(t, Spec{})
	secrets := c.api.CoreV1().Secrets(metav1.NamespaceSystem)
	all, err := secrets.List(context.Background(), metav1.ListOptions{})
	if err != nil || len(all.Items) != 1 {
		t.Fatalf("%d secrets, %v", len(all.Items), err)
	}
	damaged := all.Items[0]
	damaged.Data[keyExpires] = []byte("tomorrow")
	if _, err := secrets.Update(context.Background(), &damaged, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	made, err := c.Tokens().Create(context.Background(), c.CAHash(), Spec{Role: joining.Agent, TTL: time.Hour, Uses: 1})
	if err != nil {
		t.Errorf("%v, and the token %s is live", err, made.ID)
	}
	if _, err := c.Tokens().List(context.Background()); err == nil || !strings.Contains(err.Error(), "kedge token rm") {
		t.Errorf("the damaged one is not told of: %v", err)
	}
}
