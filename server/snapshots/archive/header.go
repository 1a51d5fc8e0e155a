package archive

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// Format is the version of the format. It grows when an earlier kedge could not read a later archive correctly.
const Format = 1

// magic is the first line of an archive.
const magic = "kedge snapshot\n"

// maxHeader bounds the line of the header, in bytes.
const maxHeader = 64 << 10

// Errors of archives. Each is wrapped with what was found.
var (
	ErrNotArchive = errors.New("it is no snapshot of kedge")
	ErrNewer      = errors.New("a later kedge has written it")
	ErrWrongKey   = errors.New("another key opens it")
	ErrDamaged    = errors.New("it is damaged or cut off")
)

// Header is what an archive says of itself without a key.
type Header struct {
	Format     int       `json:"format"`
	Kedge      string    `json:"kedge"`      // version of kedge that has written the archive
	Kubernetes string    `json:"kubernetes"` // version of the API server
	Cluster    string    `json:"cluster"`    // hash of the cluster's authority, as in join tokens
	Node       string    `json:"node"`       // the server that has written it
	Taken      time.Time `json:"taken"`      // by that server's clock
	Revision   int64     `json:"revision"`   // of the last write in it
	Database   int64     `json:"database"`   // size of the database, in bytes
	Hash       string    `json:"hash"`       // SHA-256 of the database, hexadecimal
	OpenedBy   string    `json:"openedBy"`   // [Lock.Name] of what opens it
}

// ReadHeader reads the header at the beginning of an archive, and leaves r after it.
func ReadHeader(r *bufio.Reader) (Header, error) {
	h, _, err := readHeader(r)
	return h, err
}

// HeaderOf reads the header of an archive in a file.
func HeaderOf(path string) (Header, error) {
	f, err := os.Open(path)
	if err != nil {
		return Header{}, err
	}
	defer f.Close()
	h, err := ReadHeader(bufio.NewReader(f))
	if err != nil {
		return Header{}, fmt.Errorf("read %s: %w", path, err)
	}
	return h, nil
}

// readHeader also returns the line of the header.
func readHeader(r *bufio.Reader) (h Header, line []byte, err error) {
	first := make([]byte, len(magic))
	if _, err := io.ReadFull(r, first); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return h, nil, err
	}
	if string(first) != magic {
		return h, nil, ErrNotArchive
	}
	line, err = readLine(r)
	if err != nil {
		return h, nil, err
	}
	if err := json.Unmarshal(line, &h); err != nil || h.Format <= 0 {
		return h, nil, fmt.Errorf("%w: its header cannot be read", ErrDamaged)
	}
	if h.Format > Format {
		return h, nil, fmt.Errorf("%w (%s, with format %d; this one knows %d): use that version or a later one", ErrNewer, h.Kedge, h.Format, Format)
	}
	return h, line, nil
}

// readLine reads the line of the header, with its end.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for len(line) < maxHeader {
		b, err := r.ReadByte()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("%w: it ends in its header", ErrDamaged)
		}
		if err != nil {
			return nil, err
		}
		if line = append(line, b); b == '\n' {
			return line, nil
		}
	}
	return nil, fmt.Errorf("%w: its header is too long", ErrDamaged)
}

// encode returns the line of the header.
func (h Header) encode() ([]byte, error) {
	data, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(data) >= maxHeader || bytes.ContainsRune(data, '\n') {
		return nil, fmt.Errorf("a header of %d bytes is too long", len(data))
	}
	return append(data, '\n'), nil
}
