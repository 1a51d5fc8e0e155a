package peers

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
)

// heartbeatPath is the path of heartbeats on the peer port. Every version of kedge in a cluster must agree on it.
const heartbeatPath = "/kedge/hello"

// heartbeat is the message that members send each other all the time: who the sender is, where it is now, and where it
// believes the others to be. It is an HTTP request on the peer port, so TLS has authenticated both sides as members. The
// answer has the same form and names the member at that address; so a member is not mistaken for another one that has
// taken over its address.
type heartbeat struct {
	Cluster string `json:"cluster"`
	From    Peer   `json:"from"`
	Others  []Peer `json:"others,omitempty"`

	Leader  string `json:"leader,omitempty"` // ID of the member that From follows
	Applied uint64 `json:"applied,omitempty"`

	// Removed, in an answer, tells the sender of the request that it was removed from the cluster.
	Removed bool `json:"removed,omitempty"`
}

const (
	// heartbeatInterval is the interval of heartbeats to a member that answers, and probeInterval to one that does not.
	heartbeatInterval, probeInterval = 2 * time.Second, time.Second
	// HeartbeatTimeout bounds one heartbeat, with its answer.
	HeartbeatTimeout = 1500 * time.Millisecond
	// unreachableAfter is the silence after which a member counts as unreachable.
	unreachableAfter = 5 * time.Second
	// maxHeartbeatSize bounds a heartbeat in bytes.
	maxHeartbeatSize = 64 << 10
)

// sendHeartbeat sends a heartbeat to the address and returns the answer.
func (m *Mesh) sendHeartbeat(ctx context.Context, to netip.AddrPort) (heartbeat, error) {
	body, err := json.Marshal(m.ownHeartbeat())
	if err != nil {
		return heartbeat{}, err
	}
	data, _, err := m.request(ctx, http.MethodPost, to, heartbeatPath, body)
	if err != nil {
		return heartbeat{}, err
	}
	var answer heartbeat
	if err := json.Unmarshal(data, &answer); err != nil {
		return heartbeat{}, err
	}
	if answer.Cluster != m.book.Get().Cluster {
		return heartbeat{}, errors.New("the member belongs to another cluster")
	}
	if answer.Removed {
		m.setRemoved()
	}
	m.Learn(append(answer.Others, answer.From))
	return answer, nil
}

// request sends one request to the peer port at the address.
func (m *Mesh) request(ctx context.Context, method string, to netip.AddrPort, path string, body []byte) ([]byte, http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, HeartbeatTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "https://"+encodeHost(to)+path, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	resp, err := m.client.Do(r)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxHeartbeatSize))
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("%s at %v: %s", path, to, resp.Status)
	}
	return data, resp.Header, nil
}

func (m *Mesh) ownHeartbeat() heartbeat {
	c := m.book.Get()
	h := heartbeat{Cluster: c.Cluster, From: c.Self, Others: c.Others}
	if server := m.server.Load(); server != nil {
		h.Applied = server.AppliedIndex()
		if leader := server.Leader(); leader != 0 {
			h.Leader = leader.String()
		}
	}
	return h
}

func (m *Mesh) serveHeartbeat(w http.ResponseWriter, r *http.Request) {
	var received heartbeat
	if err := json.NewDecoder(io.LimitReader(r.Body, maxHeartbeatSize)).Decode(&received); err != nil {
		http.Error(w, "malformed heartbeat", http.StatusBadRequest)
		return
	}
	answer := m.ownHeartbeat()
	if received.Cluster != answer.Cluster {
		http.Error(w, "this is another cluster", http.StatusConflict)
		return
	}
	if id, err := parseID(received.From.ID); err == nil {
		if server := m.server.Load(); server != nil && server.IsIDRemoved(uint64(id)) {
			answer.Removed = true
		}
	}
	if !answer.Removed {
		m.Learn(append(received.Others, received.From))
		// The sender is alive. If its link does not know its address, this is the moment to probe for it.
		if l := m.link(received.From.ID); l != nil && !l.currentStatus().Alive(time.Now()) {
			l.wakeup.Wake()
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		m.log.Debug("cannot answer a heartbeat", "err", err)
	}
}

// newClient returns a client for the peer port, which keeps one connection to each address open. The host in a URL is
// encoded with encodeHost, because it cannot hold the zone of an IPv6 address.
func (m *Mesh) newClient(c *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     c,
			TLSHandshakeTimeout: HeartbeatTimeout,
			IdleConnTimeout:     5 * heartbeatInterval,
			MaxIdleConnsPerHost: 1,
			DialContext: func(ctx context.Context, _, host string) (net.Conn, error) {
				to, err := decodeHost(host)
				if err != nil {
					return nil, err
				}
				return m.net.Dial(ctx, to)
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func encodeHost(a netip.AddrPort) string {
	data, err := a.MarshalBinary()
	if err != nil {
		panic(err) // MarshalBinary of an AddrPort never fails
	}
	return hex.EncodeToString(data)
}

func decodeHost(host string) (netip.AddrPort, error) {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	data, err := hex.DecodeString(name)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var a netip.AddrPort
	return a, a.UnmarshalBinary(data)
}

func parseID(s string) (types.ID, error) { return types.IDFromString(s) }
