package s3

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

const (
	// partSize is the size in bytes of the parts of an upload: what is sent again when a connection is cut. S3 takes
	// 5 MiB and more, and 10,000 parts: 80 GB.
	partSize = 8 << 20
	maxParts = 10000

	connectWithin = 10 * time.Second // for a TCP connection, and for TLS after it
	openWithin    = 3 * time.Second  // how long Open tries again: somebody waits for its answer
	abortWithin   = 10 * time.Second // for removing an upload that has failed
)

// Bucket is a folder of a bucket that was found to be usable. Its methods may be called concurrently; uploads wait for each
// other. It keeps no connection open between calls. Have one Bucket for a folder and name prefix at a time: an upload
// removes the incomplete uploads of others.
type Bucket struct {
	cfg       Config
	core      minio.Core
	transport *http.Transport
	uploading sync.Mutex    // held during an upload
	stall     time.Duration // how long a connection may carry nothing before another is tried
}

// Object is an object in the folder.
type Object struct {
	Name     string // without the folder
	Size     int64  // bytes
	Modified time.Time
	Meta     map[string]string // as given to Upload; keys in lower case
}

// Open returns the bucket after it has listed one object of it. The error says in one sentence what is wrong and what to
// do; it is one of [ErrUnreachable], [ErrUntrusted], [ErrDenied] and [ErrNoBucket], or joins the mistakes in the settings.
func Open(ctx context.Context, c Config) (*Bucket, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	roots, err := c.roots()
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: connectWithin}
	b := &Bucket{cfg: c, stall: min(stallLimit, c.Timeout), transport: &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: connectWithin,
		TLSClientConfig:     &tls.Config{RootCAs: roots, InsecureSkipVerify: c.SkipVerify, MinVersion: tls.VersionTLS12},
		// An archive is compressed already, and its size must be that of the list.
		DisableCompression: true,
	}}
	core, err := minio.NewCore(c.Endpoint, &minio.Options{
		Creds:      credentials.NewStaticV4(c.AccessKey, string(c.SecretKey), ""),
		Secure:     !c.Insecure,
		Transport:  b.transport,
		Region:     c.Region,
		MaxRetries: 1, // retry does it
	})
	if err != nil {
		return nil, fmt.Errorf("S3 endpoint %s: %w", c.Endpoint, err)
	}
	b.core = *core
	defer b.transport.CloseIdleConnections()
	err = b.retry(ctx, min(openWithin, c.Timeout), func(ctx context.Context, _ *progress) error {
		// Not whether the bucket exists: answers to HEAD requests do not say what is wrong.
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		for o := range b.core.ListObjectsIter(ctx, c.Bucket, minio.ListObjectsOptions{Prefix: b.key(""), MaxKeys: 1}) {
			return o.Err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return b, nil
}

// key returns the key of the object with a name.
func (b *Bucket) key(name string) string {
	if b.cfg.Folder == "" {
		return name
	}
	return b.cfg.Folder + "/" + name
}

// checkName refuses names that would be outside of the folder, or that some S3 servers refuse.
func checkName(name string) error {
	if !folderName.MatchString(name) || strings.Contains(name, "/") || name == "." || name == ".." {
		return fmt.Errorf("%q is not the name of an object: letters, digits and !_.*'()-", name)
	}
	return nil
}

// List returns the objects in the folder, in the order of their names; those of folders below it are left out.
func (b *Bucket) List(ctx context.Context) ([]Object, error) {
	defer b.transport.CloseIdleConnections()
	var names []string
	err := b.retry(ctx, b.cfg.Timeout, func(ctx context.Context, _ *progress) error {
		names = nil
		for o := range b.core.ListObjectsIter(ctx, b.cfg.Bucket, minio.ListObjectsOptions{Prefix: b.key("")}) {
			if o.Err != nil {
				return o.Err
			}
			if name := strings.TrimPrefix(o.Key, b.key("")); checkName(name) == nil {
				names = append(names, name)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list the objects in S3: %w", err)
	}
	objects := make([]Object, 0, len(names))
	for _, name := range names {
		// S3's list has no metadata.
		info, err := b.stat(ctx, name)
		if isNoObject(err) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read what S3 knows of %s: %w", name, err)
		}
		objects = append(objects, Object{Name: name, Size: info.Size, Modified: info.LastModified, Meta: metaOf(info)})
	}
	return objects, nil
}

// stat returns what the server knows of an object.
func (b *Bucket) stat(ctx context.Context, name string) (info minio.ObjectInfo, err error) {
	err = b.retry(ctx, b.cfg.Timeout, func(ctx context.Context, _ *progress) (err error) {
		info, err = b.core.StatObject(ctx, b.cfg.Bucket, b.key(name), minio.StatObjectOptions{})
		return err
	})
	return info, err
}

// metaOf returns the metadata that an object was uploaded with.
func metaOf(info minio.ObjectInfo) map[string]string {
	meta := map[string]string{}
	for k, v := range info.UserMetadata {
		if k = strings.ToLower(k); k != uploadKey {
			meta[k] = v
		}
	}
	return meta
}

// Remove removes an object. It is no error if there is none.
func (b *Bucket) Remove(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	defer b.transport.CloseIdleConnections()
	err := b.retry(ctx, b.cfg.Timeout, func(ctx context.Context, _ *progress) error {
		return b.core.RemoveObject(ctx, b.cfg.Bucket, b.key(name), minio.RemoveObjectOptions{})
	})
	if err != nil {
		return fmt.Errorf("remove %s from S3: %w", name, err)
	}
	return nil
}
