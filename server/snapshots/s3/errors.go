package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/minio/minio-go/v7"
)

// Errors that callers distinguish. Each comes wrapped in a sentence that says what to do.
var (
	ErrUnreachable = errors.New("the S3 server cannot be reached")
	ErrUntrusted   = errors.New("the certificate of the S3 server is not trusted")
	ErrDenied      = errors.New("the S3 server denies access")
	ErrNoBucket    = errors.New("there is no such bucket")
	ErrNoObject    = errors.New("there is no such object")
	// ErrChanged means that an object was replaced while it was downloaded. What was written is of no use.
	ErrChanged = errors.New("the object was replaced during the download")
)

// permissions are what the user of the access key must be allowed to do.
const permissions = "s3:ListBucket, s3:GetObject, s3:PutObject, s3:DeleteObject, s3:AbortMultipartUpload and s3:ListBucketMultipartUploads"

// Codes of S3's errors, which minio-go does not all export.
const (
	codeBadAccessKey  = "InvalidAccessKeyId"
	codeBadSignature  = "SignatureDoesNotMatch"
	codeClock         = "RequestTimeTooSkewed"
	codeNoBucket      = "NoSuchBucket"
	codeNoKey         = "NoSuchKey"
	codeNoUpload      = "NoSuchUpload"
	codeDenied        = "AccessDenied"
	codeOtherRegion   = "AuthorizationHeaderMalformed"
	codeInvalidRegion = "InvalidRegion"
	codeMoved         = "PermanentRedirect"
	codePrecondition  = "PreconditionFailed"
)

// explain says what is wrong and what to do.
func (b *Bucket) explain(err error) error {
	var answer minio.ErrorResponse
	if errors.As(err, &answer) {
		return b.explainAnswer(answer)
	}
	server := b.cfg.Endpoint
	var (
		authority x509.UnknownAuthorityError
		host      x509.HostnameError
		invalid   x509.CertificateInvalidError
		record    tls.RecordHeaderError
		dns       *net.DNSError
		file      *fileError
		request   *url.Error
	)
	if errors.As(err, &request) {
		err = request.Err // the URL says nothing to a user
	}
	switch {
	case errors.As(err, &file):
		return file.error
	case errors.Is(err, context.Canceled):
		return err
	case errors.As(err, &authority):
		return fmt.Errorf("%w: %s has a certificate of an authority that this machine does not know; give the authority's certificate with the settings of the endpoint", ErrUntrusted, server)
	case errors.As(err, &host):
		return fmt.Errorf("%w: the certificate of %s is not valid for that name; use a name that it has", ErrUntrusted, server)
	case errors.As(err, &invalid):
		return fmt.Errorf("%w: %s: %w; renew it, and check this machine's clock", ErrUntrusted, server, invalid)
	case errors.As(err, &record), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return fmt.Errorf("%w: %s does not speak TLS; check the port, or declare the endpoint to be insecure if it has plain http only", ErrUnreachable, server)
	case errors.As(err, &dns):
		return fmt.Errorf("%w: the name %s is not known: %w; check the endpoint, and this machine's name servers", ErrUnreachable, server, dns)
	}
	// minio-go's text for it has the URL.
	if errors.Is(err, io.EOF) || strings.HasPrefix(err.Error(), "Connection closed by foreign host") {
		err = errors.New("the connection was closed")
		if b.cfg.Insecure {
			err = errors.New("the connection was closed, as by a server that speaks TLS only")
		}
	}
	return fmt.Errorf("%w at %s: %w; check the endpoint, and the network and firewalls on the way", ErrUnreachable, server, err)
}

// explainAnswer says what the server's answer means.
func (b *Bucket) explainAnswer(a minio.ErrorResponse) error {
	c := b.cfg
	switch code := a.Code; {
	case code == codeBadAccessKey:
		return fmt.Errorf("%w: %s does not know the access key %q; correct the access key", ErrDenied, c.Endpoint, c.AccessKey)
	case code == codeBadSignature:
		return fmt.Errorf("%w: the secret key is not that of the access key %q at %s; correct the secret key", ErrDenied, c.AccessKey, c.Endpoint)
	case code == codeClock:
		return fmt.Errorf("%w: the clocks of this machine and of %s differ by more than S3 allows; set this machine's clock", ErrDenied, c.Endpoint)
	case slices.Contains([]string{codeOtherRegion, codeInvalidRegion, codeMoved}, code):
		where := "another region"
		if a.Region != "" {
			where = "the region " + a.Region
		}
		return fmt.Errorf("%w: the bucket %q is in %s, and the settings say %q; correct the region or the endpoint (%s)", ErrNoBucket, c.Bucket, where, c.Region, a.Message)
	case code == codeNoBucket:
		return fmt.Errorf("%w: %s has no bucket %q; create it, or correct its name", ErrNoBucket, c.Endpoint, c.Bucket)
	case code == codeNoKey:
		return fmt.Errorf("%w: the bucket %q at %s has no %q", ErrNoObject, c.Bucket, c.Endpoint, a.Key)
	case code == codePrecondition:
		return ErrChanged
	case code == codeNoUpload:
		return fmt.Errorf("the upload of %q was ended on %s by somebody else, perhaps by an upload that began later; upload it again", a.Key, c.Endpoint)
	case code == codeDenied, a.StatusCode == http.StatusForbidden, a.StatusCode == http.StatusUnauthorized:
		return fmt.Errorf("%w: %s does not let the access key %q do this in the bucket %q; allow it %s", ErrDenied, c.Endpoint, c.AccessKey, c.Bucket, permissions)
	case a.StatusCode == http.StatusBadRequest && strings.Contains(a.Message+a.Code, "HTTPS"):
		return fmt.Errorf("%w: %s speaks TLS only; do not declare the endpoint to be insecure", ErrUnreachable, c.Endpoint)
	}
	return fmt.Errorf("%s answers %s: %s", c.Endpoint, a.Code, a.Message)
}

// temporaryCodes are errors of S3 that may pass.
var temporaryCodes = []string{"RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestThrottled", "InternalError",
	"SlowDown", "SlowDownWrite", "SlowDownRead", "ServiceUnavailable", "OperationAborted", "ExpiredToken",
	// What arrived is not what was sent.
	"BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}

// temporary reports whether another attempt may succeed.
func temporary(err error) bool {
	var answer minio.ErrorResponse
	if errors.As(err, &answer) {
		status := answer.StatusCode
		return slices.Contains(temporaryCodes, answer.Code) || status == http.StatusRequestTimeout || status == http.StatusTooManyRequests || status == 499 ||
			status >= 500 && status != http.StatusNotImplemented
	}
	var (
		certificate *tls.CertificateVerificationError
		record      tls.RecordHeaderError
		file        *fileError
	)
	switch {
	case errors.As(err, &certificate), errors.As(err, &record), errors.As(err, &file):
		return false
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return false
	}
	return true // the network's
}

// fileError marks an error of what is read from or written to on this machine, not of the connection.
type fileError struct{ error }

func (f *fileError) Unwrap() error { return f.error }
