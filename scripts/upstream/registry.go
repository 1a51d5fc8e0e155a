package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path"
	"strings"
	"time"
)

// registry serves the images of an archive, for the few specs that pull images which the nodes have already. It
// supports GET and HEAD of manifests and blobs.
type registry struct {
	archive   *os.File
	blobs     map[string]*io.SectionReader // by digest: layers and configurations
	manifests map[string][]byte            // by digest, and by repository:tag
	server    *http.Server
}

const (
	manifestType = "application/vnd.oci.image.manifest.v1+json"
	configType   = "application/vnd.oci.image.config.v1+json"
	layerType    = "application/vnd.oci.image.layer.v1.tar"
	// mirrored is the registry that it replaces.
	mirrored = "registry.k8s.io"
)

type descriptor struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
}

func openRegistry(archive string) (*registry, error) {
	f, err := os.Open(archive)
	if err != nil {
		return nil, err
	}
	r := &registry{archive: f, blobs: map[string]*io.SectionReader{}, manifests: map[string][]byte{}}
	if err := r.index(); err != nil {
		return nil, errors.Join(fmt.Errorf("read %s: %w", archive, err), f.Close())
	}
	return r, nil
}

// index finds the objects in the archive. Its files are named by digest: DIGEST.json is a configuration,
// DIGEST/layer.tar a layer.
func (r *registry) index() error {
	var images []struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
	for t := tar.NewReader(r.archive); ; {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if h.Name == "manifest.json" {
			if err := json.NewDecoder(t).Decode(&images); err != nil {
				return err
			}
			continue
		}
		at, err := r.archive.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		r.blobs[digestOf(h.Name)] = io.NewSectionReader(r.archive, at, h.Size)
	}
	for _, img := range images {
		config, err := r.describe(configType, img.Config)
		if err != nil {
			return err
		}
		layers := make([]descriptor, len(img.Layers))
		for i, name := range img.Layers {
			if layers[i], err = r.describe(layerType, name); err != nil {
				return err
			}
		}
		data, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": manifestType, "config": config, "layers": layers})
		if err != nil {
			return err
		}
		for _, tag := range img.RepoTags {
			r.manifests[strings.TrimPrefix(tag, mirrored+"/")] = data
		}
		r.manifests[sum(data)] = data
	}
	return nil
}

func (r *registry) describe(mediaType, name string) (descriptor, error) {
	blob, ok := r.blobs[digestOf(name)]
	if !ok {
		return descriptor{}, fmt.Errorf("no %s in the archive", name)
	}
	return descriptor{mediaType, digestOf(name), blob.Size()}, nil
}

func digestOf(name string) string {
	return "sha256:" + strings.TrimSuffix(strings.TrimSuffix(name, "/layer.tar"), ".json")
}

func sum(data []byte) string {
	s := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(s[:])
}

// serve starts the server on an address of this machine, and returns the address with the port.
func (r *registry) serve(address string) (string, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		return "", err
	}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	go r.server.Serve(l) // until close
	return l.Addr().String(), nil
}

func (r *registry) close() error {
	var err error
	if r.server != nil {
		err = r.server.Close()
	}
	return errors.Join(err, r.archive.Close())
}

// ServeHTTP answers GET and HEAD of /v2/REPOSITORY/manifests/TAG and the like.
func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	repository, kind := path.Split(path.Dir(strings.TrimPrefix(req.URL.Path, "/v2/")))
	repository, ref := strings.TrimSuffix(repository, "/"), path.Base(req.URL.Path)
	var content io.ReadSeeker
	switch {
	case req.URL.Path == "/v2/":
		return
	case kind == "manifests":
		data, ok := r.manifests[ref]
		if !ok {
			data, ok = r.manifests[repository+":"+ref]
		}
		if ok {
			w.Header().Set("Content-Type", manifestType)
			w.Header().Set("Docker-Content-Digest", sum(data))
			content = bytes.NewReader(data)
		}
	case kind == "blobs":
		if blob, ok := r.blobs[ref]; ok {
			w.Header().Set("Content-Type", "application/octet-stream")
			content = io.NewSectionReader(blob, 0, blob.Size()) // an own read position
		}
	}
	if content == nil {
		http.NotFound(w, req)
		return
	}
	http.ServeContent(w, req, "", time.Time{}, content)
}
