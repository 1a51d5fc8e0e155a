package accountkeys

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"time"

	"kedge/server/peerrequests"
)

// What the servers ask each other.
const (
	statePath = peerrequests.Prefix + "service-account-keys"      // GET: state
	filePath  = peerrequests.Prefix + "service-account-keys/file" // GET: the file; PUT: apply the file, answers with the state
)

// askWithin is how long another server may take to answer.
const askWithin = 3 * time.Second

// Answer adds the answers to other servers.
func (k *Keeper) Answer(mux *http.ServeMux) {
	mux.HandleFunc("GET "+statePath, func(w http.ResponseWriter, _ *http.Request) { peerrequests.Reply(w, k.state(), nil) })
	mux.HandleFunc("GET "+filePath, func(w http.ResponseWriter, _ *http.Request) {
		data, err := k.file()
		if err != nil {
			peerrequests.Reply(w, nil, err)
			return
		}
		_, _ = w.Write(data) // the other server is gone
	})
	mux.HandleFunc("PUT "+filePath, func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), askWithin)
		defer cancel()
		data, err := peerrequests.Body(w, r)
		if err != nil {
			peerrequests.Reply(w, nil, err)
			return
		}
		s, err := k.apply(ctx, data)
		peerrequests.Reply(w, s, err)
	})
}

// Client asks other servers.
type Client struct{ by *peerrequests.Client }

// NewClient returns a client that asks by another.
func NewClient(by *peerrequests.Client) *Client { return &Client{by} }

func (c *Client) file(ctx context.Context, from peerrequests.Address) (data []byte, err error) {
	err = c.by.Ask(ctx, askWithin, http.MethodGet, from, filePath, nil, func(r io.Reader) error {
		data, err = io.ReadAll(r)
		return err
	})
	return data, err
}

func (c *Client) state(ctx context.Context, of peerrequests.Address) (s state, err error) {
	return s, c.by.Ask(ctx, askWithin, http.MethodGet, of, statePath, nil, func(r io.Reader) error { return json.NewDecoder(r).Decode(&s) })
}

func (c *Client) apply(ctx context.Context, to peerrequests.Address, file []byte) (s state, err error) {
	return s, c.by.Ask(ctx, 2*askWithin, http.MethodPut, to, filePath, bytes.NewReader(file), func(r io.Reader) error {
		return json.NewDecoder(r).Decode(&s)
	})
}
