package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"time"

	"kedge/internal/lifecycle"
)

// stallLimit bounds the time for which a connection may carry nothing before another is tried.
const stallLimit = time.Minute

var errStalled = errors.New("the connection is open and nothing gets through")

// progress tells an attempt apart that proceeds from one that hangs.
type progress struct {
	stall *time.Timer   // ends the attempt
	limit time.Duration // without a byte
	last  atomic.Int64  // when the operation has got further, in ns since 1970
}

// carried notes that bytes were carried, which another attempt may have to carry again.
func (p *progress) carried() { p.stall.Reset(p.limit) }

// further notes that the operation has got further: something is done that no further attempt has to do.
func (p *progress) further() {
	p.last.Store(time.Now().UnixNano())
	p.carried()
}

func (p *progress) since() time.Duration { return time.Since(time.Unix(0, p.last.Load())) }

// retry calls do until it succeeds, or fails with an error that does not pass, or gets no further for the time timeout. Its
// error is explained.
func (b *Bucket) retry(ctx context.Context, timeout time.Duration, do func(context.Context, *progress) error) error {
	p := &progress{limit: b.stall}
	p.last.Store(time.Now().UnixNano())
	wait := lifecycle.Backoff{First: 200 * time.Millisecond, Last: 10 * time.Second, Spread: 0.5}
	for {
		before := p.last.Load()
		err := attempt(ctx, p, do)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case !temporary(err):
			return b.explain(err)
		}
		if p.last.Load() != before {
			wait.Reset()
		}
		pause := wait.Next()
		if p.since()+pause > timeout {
			return b.explain(err)
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// attempt calls do once, and ends it when nothing is carried for p.limit.
func attempt(ctx context.Context, p *progress, do func(context.Context, *progress) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p.stall = time.AfterFunc(p.limit, func() { cancel(errStalled) })
	defer p.stall.Stop()
	err := do(ctx, p)
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		return fmt.Errorf("%w for %s", errStalled, p.limit)
	}
	return err
}

// watchedReader notes in p that bytes are read. It can seek, as minio-go needs for a body with a known hash.
type watchedReader struct {
	*io.SectionReader
	p *progress
}

func (r watchedReader) Read(buf []byte) (int, error) {
	n, err := r.SectionReader.Read(buf)
	if n > 0 {
		r.p.carried()
	}
	if err != nil && err != io.EOF {
		err = &fileError{err}
	}
	return n, err
}
