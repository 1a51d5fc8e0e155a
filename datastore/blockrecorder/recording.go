package blockrecorder

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
)

const (
	// sectorSize is what a disk writes as a whole or not at all.
	sectorSize = 512
	// blockSize is the unit in which images are stored.
	blockSize = 4096
)

// Tail is what becomes of the writes that no flush has followed before the power was cut.
type Tail string

// The tails.
const (
	Dropped Tail = "dropped" // none is on the disk
	Prefix  Tail = "prefix"  // the first ones are, and a part of the next one
	Sectors Tail = "sectors" // any sectors of them are, in any order
)

// Tails are all of them.
var Tails = []Tail{Dropped, Prefix, Sectors}

// write is data that was written, or a flush if it is nil.
type write struct {
	offset int64
	data   []byte
}

// Recording is what a disk was, and what was written to it.
type Recording struct {
	first   image
	writes  []write
	flushes []int // indices in writes of what follows each flush
}

func (r *Recording) write(offset int64, data []byte) {
	r.writes = append(r.writes, write{offset, bytes.Clone(data)})
}

func (r *Recording) flush() { r.flushes = append(r.flushes, len(r.writes)) }

func (r *Recording) clone() Recording {
	return Recording{first: r.first, writes: slices.Clone(r.writes), flushes: slices.Clone(r.flushes)}
}

// Flushes returns the number of flushes.
func (r *Recording) Flushes() int { return len(r.flushes) }

// Size returns the number of bytes that were written.
func (r *Recording) Size() (n int64) {
	for _, w := range r.writes {
		n += int64(len(w.data))
	}
	return n
}

// Image returns the content of the disk after a power cut between two flushes: after the given number of them, from 0 to
// [Recording.Flushes]. random chooses what is left of the writes after the last one.
func (r *Recording) Image(flushes int, tail Tail, random *rand.Rand) Image {
	begin, end := 0, len(r.writes)
	if flushes > 0 {
		begin = r.flushes[flushes-1]
	}
	if flushes < len(r.flushes) {
		end = r.flushes[flushes]
	}
	content := r.first.clone()
	for _, w := range r.writes[:begin] {
		content.write(w.offset, w.data)
	}
	open := r.writes[begin:end]
	switch tail {
	case Prefix:
		open = open[:random.IntN(len(open)+1)]
		for i, w := range open {
			if i == len(open)-1 {
				w.data = w.data[:random.IntN(len(w.data)/sectorSize+1)*sectorSize]
			}
			content.write(w.offset, w.data)
		}
	case Sectors:
		type sector struct {
			offset int64
			data   []byte
		}
		var sectors []sector
		for _, w := range open {
			for at := 0; at < len(w.data); at += sectorSize {
				if random.IntN(2) == 0 {
					sectors = append(sectors, sector{w.offset + int64(at), w.data[at:min(at+sectorSize, len(w.data))]})
				}
			}
		}
		random.Shuffle(len(sectors), func(i, j int) { sectors[i], sectors[j] = sectors[j], sectors[i] })
		for _, s := range sectors {
			content.write(s.offset, s.data)
		}
	case Dropped:
	}
	return Image{content}
}

// Image is the content of a disk.
type Image struct{ image }

// image is the content of a disk, without the blocks that are zero. A block is not changed once it is in an image.
type image struct {
	size   int64
	blocks map[int64][]byte // by number
}

func newImage(content []byte) image {
	m := image{size: int64(len(content)), blocks: map[int64][]byte{}}
	zero := make([]byte, blockSize)
	for at := 0; at < len(content); at += blockSize {
		if block := content[at:min(at+blockSize, len(content))]; !bytes.Equal(block, zero[:len(block)]) {
			m.write(int64(at), block)
		}
	}
	return m
}

func (m image) clone() image {
	return image{m.size, maps.Clone(m.blocks)}
}

func (m image) write(offset int64, data []byte) {
	for len(data) > 0 {
		n, at := offset/blockSize, offset%blockSize
		block := make([]byte, blockSize)
		copy(block, m.blocks[n])
		done := copy(block[at:], data)
		m.blocks[n] = block
		offset, data = offset+int64(done), data[done:]
	}
}

// Content returns the image as a whole.
func (i Image) Content() []byte {
	content := make([]byte, i.size)
	for n, b := range i.blocks {
		copy(content[n*blockSize:], b)
	}
	return content
}

// WriteFile writes the image to a new sparse file.
func (i Image) WriteFile(path string) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if closeErr := f.Close(); err == nil {
			err = closeErr
		}
	}()
	if err := f.Truncate(i.size); err != nil {
		return err
	}
	for n, b := range i.blocks {
		if _, err := f.WriteAt(b[:min(int64(len(b)), i.size-n*blockSize)], n*blockSize); err != nil {
			return fmt.Errorf("write block %d: %w", n, err)
		}
	}
	return nil
}
