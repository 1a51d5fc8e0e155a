package pki

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"
)

// File is a certificate that a machine keeps, and what belongs to it.
type File struct {
	Name          string // by which commands call it
	CertFile      string
	KeyFile       string // empty: the key is elsewhere
	AuthorityFile string // certificate of the authority that has signed it; empty: what follows in CertFile
	UsedBy        string // for the administrator
}

// Examined is what is known of a [File].
type Examined struct {
	Name      string    `json:"name"`
	File      string    `json:"file"`
	Names     []string  `json:"names"`     // subject, then names and addresses
	Authority string    `json:"authority"` // subject of the authority; for one itself its own
	CA        bool      `json:"ca"`        // it is an authority
	Ends      time.Time `json:"ends,omitzero"`
	UsedBy    string    `json:"usedBy"`
	Problem   string    `json:"problem,omitempty"` // empty: it is good
}

// soonShare is the share of its life that a certificate has left when it ends soon. Kedge renews with twice as much left at
// servers, and with a fifth or more at agents.
const soonShare = 6

// Examine reads a certificate and says what is wrong with it. Since when it is valid is told by its file: the certificates
// themselves say it of a moment before kedge existed.
func (f File) Examine(now time.Time) Examined {
	e := Examined{Name: f.Name, File: f.CertFile, Names: []string{}, UsedBy: f.UsedBy}
	st, err := os.Stat(f.CertFile)
	if err != nil {
		e.Problem = reason(err)
		return e
	}
	data, err := os.ReadFile(f.CertFile)
	if err != nil {
		e.Problem = reason(err)
		return e
	}
	e.examine(f, data, st.ModTime(), now)
	return e
}

// ExamineData is [File.Examine] for a certificate that is a part of the file CertFile, written at the time signed.
func (f File) ExamineData(data []byte, signed, now time.Time) Examined {
	e := Examined{Name: f.Name, File: f.CertFile, Names: []string{}, UsedBy: f.UsedBy}
	e.examine(f, data, signed, now)
	return e
}

func (e *Examined) examine(f File, data []byte, signed, now time.Time) {
	c, err := parseCert(f.CertFile, data)
	if err != nil {
		e.Problem = "it cannot be read as a certificate"
		return
	}
	e.Names, e.Authority, e.CA, e.Ends = namesOf(c), c.Issuer.CommonName, c.IsCA, c.NotAfter
	for _, wrong := range []error{f.fitsKey(c), f.fitsAuthority(c, data), validity(c, signed, now)} {
		if wrong != nil {
			e.Problem = wrong.Error()
			return
		}
	}
}

// reason is why a file cannot be read, without its name.
func reason(err error) string {
	var path *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "it is missing"
	case errors.As(err, &path):
		return "it cannot be read: " + path.Err.Error()
	}
	return err.Error()
}

func namesOf(c *x509.Certificate) []string {
	names := []string{c.Subject.CommonName}
	for _, o := range c.Subject.Organization {
		names = append(names, "group "+o)
	}
	for _, d := range c.DNSNames {
		if !slices.Contains(names, d) {
			names = append(names, d)
		}
	}
	return append(names, ipStrings(c.IPAddresses)...)
}

func (f File) fitsKey(c *x509.Certificate) error {
	if f.KeyFile == "" {
		return nil
	}
	key, err := loadSigner(f.KeyFile)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("its key %s is missing", f.KeyFile)
	}
	if err != nil {
		return err
	}
	if !fits(c, key) {
		return fmt.Errorf("it does not fit its key %s", f.KeyFile)
	}
	return nil
}

func (f File) fitsAuthority(c *x509.Certificate, data []byte) error {
	if c.IsCA && !bytes.Equal(c.RawIssuer, c.RawSubject) {
		return nil // an administrator's, which another authority has signed: kedge trusts it for itself
	}
	file, err := f.AuthorityFile, error(nil)
	if file == "" {
		file = f.CertFile
		if _, data = pem.Decode(data); c.IsCA {
			data = PEM(c)
		}
	} else if data, err = os.ReadFile(file); err != nil {
		return fmt.Errorf("its authority %s: %s", file, reason(err))
	}
	ca, err := parseCert(file, data)
	if err != nil {
		return fmt.Errorf("its authority cannot be read from %s", file)
	}
	if err := c.CheckSignatureFrom(ca); err != nil {
		return fmt.Errorf("the authority in %s has not signed it", file)
	}
	return nil
}

func validity(c *x509.Certificate, signed, now time.Time) error {
	switch left := c.NotAfter.Sub(now); {
	case left < 0:
		return fmt.Errorf("it has ended")
	case left < c.NotAfter.Sub(signed)/soonShare:
		return fmt.Errorf("it ends in %s and was not renewed", left.Round(time.Minute))
	}
	return nil
}
