package cni

import (
	"encoding/json"
	"net"
	"strings"
	"testing"
	"time"

	"kedge/network/cniclient"
)

// timed is a connection that records the deadline of its answer.
type timed struct {
	net.Conn
	write time.Time
}

func (c *timed) SetDeadline(at time.Time) error {
	c.write = at
	return c.Conn.SetDeadline(at)
}

func (c *timed) SetWriteDeadline(at time.Time) error {
	c.write = at
	return c.Conn.SetWriteDeadline(at)
}

// TestAnswerHasTime: a client waits for its answer longer than it may take to ask.
func TestAnswerHasTime(t *testing.T) {
	client, conn := net.Pipe()
	defer client.Close()
	at := &timed{Conn: conn}
	go newPlugin(t).serveConn(t.Context(), at)
	if err := json.NewEncoder(client).Encode(cniclient.Request{Command: "STATUS", Config: []byte(`{}`)}); err != nil {
		t.Fatal(err)
	}
	var resp cniclient.Response
	if err := json.NewDecoder(client).Decode(&resp); err != nil || !strings.Contains(string(resp.Output), "not ready") {
		t.Errorf("answer %s, %v", resp.Output, err)
	}
	if !at.write.IsZero() {
		t.Error("the answer has to be sent by the time at which the question had to have come")
	}
}
