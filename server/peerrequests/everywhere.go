package peerrequests

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
)

// Everywhere has every server of the cluster apply a change.
type Everywhere struct {
	Own     string                                      // the name of this server
	Members func(ctx context.Context) ([]string, error) // the names of the servers
	APIs    func() map[string]string                    // ADDRESS:PORT by name, of the servers that are known
	// ApplyOwn applies the change on this server, and ApplyOther has another one apply it.
	ApplyOwn   func(ctx context.Context) error
	ApplyOther func(ctx context.Context, to Address) error
	// Note is called with the addresses of the servers before they are asked.
	Note func([]Address)
}

// Run returns nil if all have applied the change that are servers at its end: a machine that joins later gets what one of them
// has.
func (e Everywhere) Run(ctx context.Context) error {
	applied := map[string]bool{}
	for {
		members, err := e.Members(ctx)
		if err != nil {
			return fmt.Errorf("the servers of the cluster are not known: %w", err)
		}
		members = slices.DeleteFunc(members, func(name string) bool { return applied[name] })
		if len(members) == 0 {
			return nil
		}
		if !applied[e.Own] { // first: the others can do without a new key of which nobody else has heard, and this one cannot
			if err := e.ApplyOwn(ctx); err != nil {
				return fmt.Errorf("server %s: %w", e.Own, err)
			}
			applied[e.Own] = true
			continue
		}
		if err := e.others(ctx, members); err != nil {
			return err
		}
		for _, name := range members {
			applied[name] = true
		}
	}
}

// others has other servers apply the change, all at once.
func (e Everywhere) others(ctx context.Context, members []string) error {
	apis := e.APIs()
	e.Note(Addresses(apis))
	errs := make([]error, len(members))
	var group sync.WaitGroup
	for i, name := range members {
		group.Go(func() {
			api, known := apis[name]
			if !known {
				errs[i] = errors.New("its API is not known yet")
				return
			}
			errs[i] = e.ApplyOther(ctx, Address{Name: name, API: api})
		})
	}
	group.Wait()
	var all []string
	for i, err := range errs {
		if err != nil {
			all = append(all, fmt.Sprintf("server %s: %v", members[i], err))
		}
	}
	if len(all) > 0 {
		return errors.New(strings.Join(all, "; "))
	}
	return nil
}
