package secretsencryption

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
	statePath = peerrequests.Prefix + "secrets-encryption"        // GET: state
	filePath  = peerrequests.Prefix + "secrets-encryption/config" // GET: the file; PUT: apply the file, answers with the state
)

// Limits of what the servers ask each other.
const (
	askWithin   = 3 * time.Second
	applyWithin = 15 * time.Second // an API server that lags catches up first
)

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
		ctx, cancel := context.WithTimeout(r.Context(), applyWithin)
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

// File returns the content of the file of the server called name, whose API is at ADDRESS:PORT.
func (c *Client) File(ctx context.Context, name, api string) (data []byte, err error) {
	err = c.by.Ask(ctx, askWithin, http.MethodGet, address{Name: name, API: api}, filePath, nil, func(r io.Reader) error {
		data, err = io.ReadAll(r)
		return err
	})
	return data, err
}

func (c *Client) state(ctx context.Context, of address) (s state, err error) {
	return s, c.by.Ask(ctx, askWithin, http.MethodGet, of, statePath, nil, func(r io.Reader) error { return json.NewDecoder(r).Decode(&s) })
}

func (c *Client) apply(ctx context.Context, to address, file []byte) (s state, err error) {
	return s, c.by.Ask(ctx, applyWithin+askWithin, http.MethodPut, to, filePath, bytes.NewReader(file), func(r io.Reader) error {
		return json.NewDecoder(r).Decode(&s)
	})
}
