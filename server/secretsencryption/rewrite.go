package secretsencryption

import (
	"context"
	"fmt"
	"strings"
	"time"
)

const (
	// pageItems is how many Secrets are read at a time at most, and firstItems at first: the number follows their size, so that
	// a page has about pageBytes. A Secret has up to about a megabyte. etcd's transactions have up to 128 operations.
	pageItems, firstItems = 120, 15
	pageBytes             = 1 << 20
	// batchBytes bounds the values of one transaction: the datastore takes 1.5 MB.
	batchBytes = 512 << 10
	// pauseShare is which part of the time of a transaction the pause after it has.
	pauseShare = 4
	// progressInterval is how often the progress is written.
	progressInterval = time.Second
)

// rewriting is one rewriting of all Secrets.
type rewriting struct {
	c         *Controller
	s         Store
	r         *record
	revision  int64 // of the record
	config    configuration
	to        provider
	noted     time.Time // when the progress was written last
	rewritten int       // in this pass
	all       int       // in all passes
	conflicts int       // Secrets that were changed meanwhile, in this pass
	bad       []string  // Secrets that no key decrypts
}

// rewrite rewrites the Secrets that the new provider has not written, until a pass over all finds none. It goes on where an
// earlier one has stopped, because a Secret says by itself which key it has. Each write is a transaction that fails if the
// Secret or the record has changed: a server that has led before writes nothing.
func (c *Controller) rewrite(ctx context.Context, s Store, r *record, revision int64) (int64, error) {
	own, err := c.own.config()
	if err != nil {
		return 0, err
	}
	config, missing := own.pick(r.wanted())
	if len(missing) > 0 {
		return 0, fmt.Errorf("this server lacks %s", strings.Join(missing, ", "))
	}
	began := time.Now()
	w := &rewriting{c: c, s: s, r: r, revision: revision, config: config, to: config[0], noted: c.now()}
	for {
		w.rewritten, w.conflicts, w.bad = 0, 0, nil
		if err := w.pass(ctx); err != nil {
			return 0, err
		}
		if len(w.bad) > 0 {
			return 0, fmt.Errorf("%d Secrets can be read with no key of the cluster, such as %s; while they exist the old key is kept, in case a backup helps", len(w.bad), w.bad[0])
		}
		w.all += w.rewritten
		if w.rewritten == 0 && w.conflicts == 0 {
			c.log.Info("all Secrets have been rewritten", "by", w.to.Name, "secrets", w.all, "took", time.Since(began).Round(time.Millisecond))
			return w.revision, nil
		}
	}
}

// pass goes over all Secrets once.
func (w *rewriting) pass(ctx context.Context) error {
	total, err := w.s.Count(ctx, w.c.prefix)
	if err != nil {
		return err
	}
	begins := w.r.Total == 0
	w.r.Total, w.r.Done = total, 0
	if begins {
		if err := w.note(ctx); err != nil {
			return err
		}
	}
	limit := firstItems
	for from, first := "", true; first || from != ""; first = false {
		var items []Item
		if items, from, err = w.s.Page(ctx, w.c.prefix, from, limit); err != nil {
			return err
		}
		limit = nextLimit(limit, items)
		if err := w.page(ctx, items); err != nil {
			return err
		}
		if w.c.now().Sub(w.noted) >= progressInterval {
			if err := w.note(ctx); err != nil {
				return err
			}
		}
	}
	return w.note(ctx)
}

// nextLimit is the number of Secrets to read after a page of up to limit.
func nextLimit(limit int, page []Item) int {
	size := 0
	for _, i := range page {
		size += len(i.Value)
	}
	if size > pageBytes {
		return max(limit/2, 1)
	}
	return min(limit*2, pageItems)
}

// note writes the progress.
func (w *rewriting) note(ctx context.Context) (err error) {
	w.noted = w.c.now()
	w.r.Waits = ""
	w.revision, err = writeRecord(ctx, w.s, w.r, w.revision)
	return err
}

// page rewrites the Secrets among items that need it.
func (w *rewriting) page(ctx context.Context, items []Item) error {
	var batch []Item
	size := 0
	for _, i := range items {
		if w.to.wrote(i.Value) {
			w.r.Done++
			continue
		}
		content, err := w.config.read(ctx, i.Value)
		if err != nil {
			w.bad = append(w.bad, strings.TrimPrefix(i.Key, w.c.prefix)+" ("+err.Error()+")")
			continue
		}
		if i.Value, err = w.to.write(ctx, content); err != nil {
			return err
		}
		if size += len(i.Value); size > batchBytes && len(batch) > 0 {
			if err := w.commit(ctx, batch); err != nil {
				return err
			}
			batch, size = nil, len(i.Value)
		}
		batch = append(batch, i)
	}
	return w.commit(ctx, batch)
}

// commit writes a batch, and one by one if something has changed meanwhile. Then it leaves the datastore to others for a while.
func (w *rewriting) commit(ctx context.Context, batch []Item) error {
	if len(batch) == 0 {
		return nil
	}
	began := time.Now()
	written, err := w.s.Rewrite(ctx, recordKey, w.revision, batch)
	if err != nil {
		return fmt.Errorf("rewrite Secrets: %w", err)
	}
	switch {
	case written:
		w.rewritten += len(batch)
		w.r.Done += len(batch)
	case len(batch) == 1:
		w.conflicts++ // whoever has changed it has written it with the new provider; the next pass sees it
		return w.still(ctx)
	default:
		for _, i := range batch {
			if err := w.commit(ctx, []Item{i}); err != nil {
				return err
			}
		}
		return nil
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(time.Since(began) / pauseShare):
		return nil
	}
}

// still returns nil if the record has not changed.
func (w *rewriting) still(ctx context.Context) error {
	_, revision, _, err := w.s.Get(ctx, recordKey)
	if err == nil && revision != w.revision {
		err = errChanged
	}
	return err
}
