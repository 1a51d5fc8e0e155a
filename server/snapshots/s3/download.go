package s3

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/minio/minio-go/v7"
)

// isNoObject reports whether the error says that there is no such object.
func isNoObject(err error) bool {
	return errors.Is(err, ErrNoObject) || minio.ToErrorResponse(err).Code == codeNoKey
}

// Download writes the object with a name to w. After a broken connection it goes on where it was. When it returns an error,
// w has got the beginning of the object, or nothing. It takes no memory for the content but a buffer of 32 KiB.
func (b *Bucket) Download(ctx context.Context, name string, w io.Writer) error {
	if err := checkName(name); err != nil {
		return err
	}
	defer b.transport.CloseIdleConnections()
	info, err := b.stat(ctx, name)
	if err != nil {
		return fmt.Errorf("download %s from S3: %w", name, err)
	}
	var written int64
	err = b.retry(ctx, b.cfg.Timeout, func(ctx context.Context, p *progress) error {
		if written == info.Size {
			return nil
		}
		opts := minio.GetObjectOptions{}
		if err := errors.Join(opts.SetMatchETag(info.ETag), opts.SetRange(written, info.Size-1)); err != nil {
			return err
		}
		body, _, _, err := b.core.GetObject(ctx, b.cfg.Bucket, b.key(name), opts)
		if err != nil {
			return err
		}
		defer body.Close()
		n, err := io.Copy(furtherWriter{w, p}, io.LimitReader(body, info.Size-written))
		written += n
		if err == nil && written < info.Size {
			err = io.ErrUnexpectedEOF
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("download %s from S3: %w", name, err)
	}
	return nil
}

// furtherWriter notes in p that bytes have got through, and marks errors of w.
type furtherWriter struct {
	w io.Writer
	p *progress
}

func (f furtherWriter) Write(data []byte) (int, error) {
	f.p.further()
	n, err := f.w.Write(data)
	if err != nil {
		err = &fileError{err}
	}
	return n, err
}
