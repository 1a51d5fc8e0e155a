package s3

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"

	"github.com/minio/minio-go/v7"
)

// uploadKey is the key of the metadata that tells an object of this upload from an older one with the same name.
const uploadKey = "kedge-upload"

var (
	metaKey   = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
	metaValue = regexp.MustCompile(`^[!-~]([ -~]*[!-~])?$`)
)

// maxMeta bounds the metadata, in bytes of keys and values: S3's limit is 2 KiB.
const maxMeta = 1900

// upload is one upload of a file.
type upload struct {
	*Bucket
	file *os.File
	size int64 // when the upload began; the file must not change
	key  string
	id   string // random, in the metadata
	opts minio.PutObjectOptions
}

// Upload stores the file at path under the name, in place of an object with that name. The object appears when it is whole.
// Keys of meta are of a-z, 0-9 and dashes; values are of ASCII. The file must not change meanwhile.
//
// First, incomplete uploads of this node's names are removed. A part that was cut off is sent again; nothing is sent twice
// otherwise. On an error, what has arrived is removed; the next upload tries that again if it was not possible.
//
// Besides buffers of the connection, some 100 kB, Upload takes no memory for the content.
func (b *Bucket) Upload(ctx context.Context, path, name string, meta map[string]string) (err error) {
	if err := errors.Join(checkName(name), checkMeta(meta)); err != nil {
		return err
	}
	b.uploading.Lock()
	defer b.uploading.Unlock()
	defer b.transport.CloseIdleConnections()
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > maxParts*partSize {
		return fmt.Errorf("%s cannot be uploaded: it is not a file of at most %d GB", path, int64(maxParts)*partSize/1_000_000_000)
	}
	u := &upload{Bucket: b, file: f, size: info.Size(), key: b.key(name), id: rand.Text()}
	u.opts = minio.PutObjectOptions{ContentType: "application/octet-stream", UserMetadata: map[string]string{uploadKey: u.id}, DisableContentSha256: true}
	for k, v := range meta {
		u.opts.UserMetadata[k] = v
	}
	if err := b.removeIncomplete(ctx); err != nil {
		return fmt.Errorf("remove incomplete uploads from S3: %w", err)
	}
	if u.size <= partSize {
		err = u.whole(ctx)
	} else {
		err = u.inParts(ctx)
	}
	if err != nil {
		return fmt.Errorf("upload %s to S3: %w", name, err)
	}
	return nil
}

// checkMeta refuses metadata that is not the same after it went through headers of HTTP.
func checkMeta(meta map[string]string) error {
	total := 0
	for k, v := range meta {
		total += len(k) + len(v)
		if !metaKey.MatchString(k) || k == uploadKey {
			return fmt.Errorf("%q is not a key of metadata: a-z, 0-9 and dashes", k)
		}
		if v != "" && !metaValue.MatchString(v) {
			return fmt.Errorf("%q of %s is not a value of metadata: ASCII without control characters, and without spaces at the ends", v, k)
		}
	}
	if total > maxMeta {
		return fmt.Errorf("the metadata has %d bytes; the limit is %d", total, maxMeta)
	}
	return nil
}

// removeIncomplete removes what uploads of this node's names have left that were cut off and could not clear up.
func (b *Bucket) removeIncomplete(ctx context.Context) error {
	var found []minio.ObjectMultipartInfo
	err := b.retry(ctx, b.cfg.Timeout, func(ctx context.Context, _ *progress) error {
		found = nil
		key, id := "", ""
		for {
			r, err := b.core.ListMultipartUploads(ctx, b.cfg.Bucket, b.key(b.cfg.NamePrefix), key, id, "", 1000)
			if err != nil {
				return err
			}
			found = append(found, r.Uploads...)
			// A server that repeats itself must not keep the upload for ever.
			if !r.IsTruncated || r.NextKeyMarker == key && r.NextUploadIDMarker == id {
				return nil
			}
			key, id = r.NextKeyMarker, r.NextUploadIDMarker
		}
	})
	if err != nil {
		return err
	}
	for _, u := range found {
		// Not of folders below this one.
		if checkName(strings.TrimPrefix(u.Key, b.key(""))) != nil {
			continue
		}
		if err := b.abort(ctx, u.Key, u.UploadID); err != nil {
			return err
		}
	}
	return nil
}

// abort removes an incomplete upload. It is no error if there is none.
func (b *Bucket) abort(ctx context.Context, key, id string) error {
	return b.retry(ctx, b.cfg.Timeout, func(ctx context.Context, _ *progress) error {
		err := b.core.AbortMultipartUpload(ctx, b.cfg.Bucket, key, id)
		if minio.ToErrorResponse(err).Code == codeNoUpload {
			return nil
		}
		return err
	})
}

// whole uploads the file by one request.
func (u *upload) whole(ctx context.Context) error {
	sum, err := u.hash(0, u.size)
	if err != nil {
		return err
	}
	return u.retry(ctx, u.cfg.Timeout, func(ctx context.Context, p *progress) error {
		_, err := u.core.PutObject(ctx, u.cfg.Bucket, u.key, u.section(p, 0, u.size), u.size, "", sum, u.opts)
		return err
	})
}

// inParts uploads the file part by part.
func (u *upload) inParts(ctx context.Context) (err error) {
	var id string
	err = u.retry(ctx, u.cfg.Timeout, func(ctx context.Context, _ *progress) (err error) {
		id, err = u.core.NewMultipartUpload(ctx, u.cfg.Bucket, u.key, u.opts)
		return err
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			// Not with ctx: it may be the reason for the end.
			after, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortWithin)
			defer cancel()
			_ = u.abort(after, u.key, id) // the next upload tries again
		}
	}()
	var parts []minio.CompletePart
	for at := int64(0); at < u.size; at += partSize {
		n := min(partSize, u.size-at)
		sum, err := u.hash(at, n)
		if err != nil {
			return err
		}
		number := len(parts) + 1
		err = u.retry(ctx, u.cfg.Timeout, func(ctx context.Context, p *progress) error {
			part, err := u.core.PutObjectPart(ctx, u.cfg.Bucket, u.key, id, number, u.section(p, at, n), n, minio.PutObjectPartOptions{Sha256Hex: sum, DisableContentSha256: true})
			if err == nil {
				parts = append(parts, minio.CompletePart{PartNumber: number, ETag: part.ETag})
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return u.complete(ctx, id, parts)
}

// complete makes the object of its parts.
func (u *upload) complete(ctx context.Context, id string, parts []minio.CompletePart) error {
	return u.retry(ctx, u.cfg.Timeout, func(ctx context.Context, p *progress) error {
		// Servers that copy the parts take their time, and say nothing meanwhile.
		p.stall.Reset(u.cfg.Timeout)
		_, err := u.core.CompleteMultipartUpload(ctx, u.cfg.Bucket, u.key, id, parts, minio.PutObjectOptions{})
		if err != nil && minio.ToErrorResponse(err).Code != codeNoUpload {
			return err
		}
		// Without such an upload, an earlier attempt has succeeded and its answer was lost, or somebody else has removed the
		// upload. Some servers do not say even that. The object tells.
		info, err := u.core.StatObject(ctx, u.cfg.Bucket, u.key, minio.StatObjectOptions{})
		if err != nil && !isNoObject(err) {
			return err
		}
		for k, v := range info.UserMetadata {
			if strings.EqualFold(k, uploadKey) && v == u.id && info.Size == u.size {
				return nil
			}
		}
		return minio.ErrorResponse{Code: codeNoUpload, Key: u.key}
	})
}

// hash returns the SHA-256 of a part of the file, which the server compares with what arrives. It is signed.
func (u *upload) hash(at, n int64) (string, error) {
	h := sha256.New()
	if read, err := io.Copy(h, io.NewSectionReader(u.file, at, n)); err != nil {
		return "", err
	} else if read != n {
		return "", fmt.Errorf("%s has become shorter during the upload", u.file.Name())
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func (u *upload) section(p *progress, at, n int64) io.Reader {
	return watchedReader{io.NewSectionReader(u.file, at, n), p}
}
