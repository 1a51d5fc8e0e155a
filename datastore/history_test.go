package datastore

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"kedge/internal/test/history"
)

// record starts clients that write and read through the member that pick returns.
func record(pick func(client int) *testNode, clients, keys int) *history.History {
	h := history.New()
	for client := range clients {
		h.Client(func() time.Duration { return time.Duration(1+rand.IntN(10)) * time.Millisecond }, func(n int) {
			askOnce(h, client, n, pick(client), fmt.Sprintf("/h/%d", rand.IntN(keys)))
		})
	}
	return h
}

func askOnce(h *history.History, client, n int, node *testNode, key string) {
	c, err := node.current.Load().NewClient()
	if err != nil {
		return // it was not asked
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if rand.IntN(2) == 0 {
		value := fmt.Sprintf("%d-%d", client, n)
		h.Write(client, key, value, func() error { _, err := c.Put(ctx, key, value); return err })
		return
	}
	h.Read(client, key, func() (string, error) {
		got, err := c.KV.Get(ctx, key)
		if err != nil || len(got.Kvs) == 0 {
			return "", err
		}
		return string(got.Kvs[0].Value), nil
	})
}
