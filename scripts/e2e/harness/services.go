package harness

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"kedge/internal/namespaces"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Servers starts pods NAME-0, NAME-1 ... with the label app=NAME that answer with
// their names at "/" and with the caller's address at "/addr", port 8080.
func (n *Node) Servers(t *testing.T, namespace, name string, count int, more string) []*corev1.Pod {
	t.Helper()
	for i := range count {
		n.Apply(t, namespace, n.server(name, i, more))
	}
	var pods []*corev1.Pod
	for i := range count {
		pods = append(pods, n.WaitPod(t, namespace, fmt.Sprint(name, "-", i), false))
	}
	return pods
}

func (n *Node) server(name string, i int, more string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s-%d, labels: {app: %s}}, spec: {terminationGracePeriodSeconds: 1, %s containers: [{name: main, image: %q,
		command: [probe, serve, ":8080", %s-%d], readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}}]}}`,
		name, i, name, more, Busybox, name, i)
}

// Service creates a service for the pods with the label app=NAME and returns it, with
// its addresses. Fields end with a comma.
func (n *Node) Service(t *testing.T, namespace, name, app, fields string) *corev1.Service {
	t.Helper()
	n.Apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {selector: {app: %s}, %s ports: [{port: 80, targetPort: 8080}]}}`, name, app, fields))
	s, err := n.Client.CoreV1().Services(namespace).Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// get asks by connections of dial and returns the answer, without spaces around it. An
// answer that says that something is wrong is an error.
func get(url string, timeout time.Duration, dial func(ctx context.Context, network, address string) (net.Conn, error)) (string, error) {
	client := http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode >= 400 && err == nil {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return strings.TrimSpace(string(body)), err
}

// Get asks from the node itself, as processes on it do.
func (n *Node) Get(url string) (string, error) {
	return get(url, 2*time.Second, func(_ context.Context, network, address string) (conn net.Conn, err error) {
		err = n.Inside(func() (err error) {
			conn, err = net.DialTimeout(network, address, 2*time.Second)
			return err
		})
		return conn, err
	})
}

// AskDNS asks a name server from where the node is and returns the last record's data, or
// the response code.
func (n *Node) AskDNS(t *testing.T, server, name string, qtype uint16) string {
	t.Helper()
	conn, err := n.Dial("udp", server+":53")
	if err != nil {
		return err.Error()
	}
	defer conn.Close()
	c := &dns.Client{Timeout: 6 * time.Second}
	m, _, err := c.ExchangeWithConn(new(dns.Msg).SetQuestion(name, qtype), &dns.Conn{Conn: conn})
	switch {
	case err != nil:
		return err.Error()
	case len(m.Answer) == 0:
		return dns.RcodeToString[m.Rcode]
	}
	rr := m.Answer[len(m.Answer)-1]
	return strings.TrimPrefix(rr.String(), rr.Header().String())
}

// DialFrom opens a connection from a network namespace.
func DialFrom(ns *namespaces.Network, network, address string) (conn net.Conn, err error) {
	err = ns.Do(func() error {
		conn, err = net.DialTimeout(network, address, time.Second)
		return err
	})
	return conn, err
}

// CheckAnswer is nil when the URL's body is text.
func CheckAnswer(url, text string) error {
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body := make([]byte, 1000)
	length, _ := resp.Body.Read(body)
	if got := strings.TrimSpace(string(body[:length])); got != text {
		return fmt.Errorf("%s answers %q, want %q", url, got, text)
	}
	return nil
}
